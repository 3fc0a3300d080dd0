"""ONNX Runtime (CPU execution provider)."""

from __future__ import annotations

REQUIREMENTS = ("onnxruntime>=1.19,<2", "numpy>=1.26,<3")
MODULES = ("onnxruntime", "numpy")
ARCHITECTURES = ("x86_64", "aarch64")
OLDEST_GLIBC = (2, 27)
