"""Ed25519 signatures of bytes (RFC 8032), with keys as PEM files that OpenSSL reads too."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from edgeprune.core.errors import UsageError
from edgeprune.core.family import MissingLibrary

MAKE_KEY = "openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out public.pem"


class Signer:
    """A private key. Deterministic: the same bytes get the same signature.

    path: a PEM file (PKCS #8) without a password.
    raises: UsageError when it is none, or of another kind; MissingLibrary.
    """

    def __init__(self, path: Path) -> None:
        key = _load(path, "load_pem_private_key", "private", password=None)
        self._sign = key.sign
        self.public = key.public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        signature: bytes = self._sign(data)
        return signature


def read_public_key(path: Path) -> str:
    """The 32 bytes of a public key in a PEM file, as hex digits. raises: UsageError; MissingLibrary."""
    public: str = _load(path, "load_pem_public_key", "public").public_bytes_raw().hex()
    return public


def signature_fits(public: str, signature: bytes, data: bytes) -> bool:
    """Whether a signature of these bytes was made with the private key of `public` (hex digits).

    raises: MissingLibrary.
    """
    _serialization()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _serialization() -> ModuleType:
    try:
        from cryptography.hazmat.primitives import serialization
    except ModuleNotFoundError as error:
        raise MissingLibrary("signatures need cryptography: pip install 'edgeprune[sign]'") from error
    return serialization


def _load(path: Path, function: str, kind: str, **options: Any) -> Any:
    load = getattr(_serialization(), function)
    try:
        key = load(path.read_bytes(), **options)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is no PEM file of a {kind} key without a password; make one: {MAKE_KEY}") from error
    except Exception as error:  # cryptography's UnsupportedAlgorithm
        raise UsageError(f"{path} holds a key that cannot be used; make an Ed25519 one: {MAKE_KEY}") from error
    if "Ed25519" not in type(key).__name__:
        raise UsageError(f"{path} holds a {type(key).__name__.lstrip('_')}, not an Ed25519 key; make one: {MAKE_KEY}")
    return key
