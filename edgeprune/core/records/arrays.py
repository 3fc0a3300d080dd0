"""Plain types that records hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Widths = Mapping[str, int]
"""Group name -> units kept. A group that is not named keeps all its units."""
