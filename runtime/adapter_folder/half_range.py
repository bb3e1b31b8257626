"""How large an adapter's numbers get in a graph: what float16 cannot hold is refused before anything overflows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_HALF = 65_504.0
_CHUNK_ROWS = 1024

Matrix = NDArray[np.float32]


def largest_update(a: Matrix, b: Matrix, scale: float, above: float = 0.0) -> float:
    """max |scale * B A| over all elements; an upper bound (Cauchy-Schwarz) when that is not above `above`."""
    rows = np.linalg.norm(b.astype(np.float64), axis=1)
    columns = np.linalg.norm(a.astype(np.float64), axis=0)
    bound = abs(scale) * float(rows.max() * columns.max())
    if bound <= above:
        return bound
    # Exact, in chunks of the rows that could reach it, so that no [out, in] matrix is made.
    wide = a.astype(np.float64)
    starts = range(0, len(b), _CHUNK_ROWS)
    return abs(scale) * max(float(np.abs(b[start : start + _CHUNK_ROWS] @ wide).max()) for start in starts)


def largest_value(a: Matrix, b: Matrix, scale: float, above: float) -> float:
    """The largest of an update's factors, and of the update itself where that is above `above`."""
    scale = abs(scale)  # multiplies the scalings, in the graph's dtype too
    factor = max(float(np.abs(a).max()), float(np.abs(b).max()) * max(1.0, scale), scale)
    return max(factor, largest_update(a, b, scale, above))
