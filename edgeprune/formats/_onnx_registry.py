"""PyTorch's table of operators in ONNX: read once for many exports, not anew for each, which takes a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TABLES: dict[object, Any] = {}
"""The last one, by its options (the opset) and the operators that torchvision, where it is imported, has added."""


@contextmanager
def tables_kept() -> Iterator[None]:
    """While it lasts `torch.onnx.export` takes the table that it read before; nothing changes for anybody else.

    A PyTorch that makes its tables elsewhere only stays slow.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry as Registry

        plain: Any = Registry.__dict__["from_torchlib"]
        make: Callable[..., Any] = Registry.from_torchlib
        operators: Callable[[], list[str]] = torch._C._dispatch_get_all_op_names
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def kept(*_: Any, **options: int) -> Any:
        added = frozenset(name for name in operators() if name.startswith("torchvision::"))
        key = frozenset(options.items()), added
        if key not in _TABLES:
            _TABLES.clear()
            _TABLES[key] = make(**options)
        return _TABLES[key]

    Registry.from_torchlib = kept  # type: ignore[method-assign]
    try:
        yield
    finally:
        Registry.from_torchlib = plain  # type: ignore[method-assign]
