"""Base weights made smaller, simulated in numpy: block-wise symmetric integers, and truncated SVD of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
BLOCK = 32  # weights of one output that share a scale
SCALE_BYTES = 2  # scales and SVD factors are float16
# Upper edges of |error| / rms(weight), four a decade; one more bin is open.
BINS = tuple(float(f"{edge:.4g}") for edge in 10.0 ** np.arange(-4, 1.01, 0.25))


@dataclass(frozen=True, slots=True)
class Compressed:
    """What a scheme makes of one weight: the values it stands for, and what it takes to store them."""

    values: Floats  # [out, in]
    bytes: int
    rank: int | None = None


Scheme = Callable[[Floats], Compressed]


def quantized(weight: Floats, bits: int) -> Compressed:
    """Round to nearest in blocks of BLOCK inputs: q = round(w / scale), scale = max |w| / (2^(bits-1) - 1)."""
    out, width = weight.shape
    blocks = -(-width // BLOCK)
    padded = np.zeros((out, blocks * BLOCK), np.float32)
    padded[:, :width] = weight
    grouped = padded.reshape(out, blocks, BLOCK)
    largest = 2 ** (bits - 1) - 1
    scale = (np.abs(grouped).max(-1, keepdims=True) / largest).astype(np.float16).astype(np.float32)
    steps = np.divide(grouped, scale, out=np.zeros_like(grouped), where=scale > 0)
    values = np.clip(np.rint(steps), -largest, largest) * scale
    return Compressed(values.reshape(out, -1)[:, :width], integer_bytes(weight.shape, bits))


def integer_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Integers, rows filled up to whole bytes, and one scale a block."""
    out, width = shape
    return out * (-(-width * bits // 8) + -(-width // BLOCK) * SCALE_BYTES)


def factors(weight: Floats, rank: int) -> tuple[Floats, Floats]:
    """The best approximation of this rank (Eckart and Young) as u sqrt(s) [out, r] and sqrt(s) vt [r, in]."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def low_rank(weight: Floats, budget: int) -> Compressed:
    """Two float16 factors of the largest rank that fits into `budget` bytes, at least 1."""
    out, width = weight.shape
    rank = int(np.clip(budget // (SCALE_BYTES * (out + width)), 1, min(out, width)))
    left, right = (factor.astype(np.float16).astype(np.float32) for factor in factors(weight, rank))
    return Compressed(left @ right, rank * SCALE_BYTES * (out + width), rank)


def schemes() -> dict[str, Scheme]:
    """int8 and int4, and each one's rival of equal bytes."""
    found: dict[str, Scheme] = {}
    for bits in (8, 4):
        found[f"int{bits}"] = partial(quantized, bits=bits)
        found[f"svd at int{bits}"] = partial(low_rank_as_int, bits=bits)
    return found


def low_rank_as_int(weight: Floats, bits: int) -> Compressed:
    """SVD at the bytes of integers."""
    return low_rank(weight, integer_bytes(weight.shape, bits))


def error_counts(weight: Floats, values: Floats) -> tuple[int, ...]:
    """Entries by |error| / rms(weight), one count a bin of BINS and one beyond."""
    rms = float(np.sqrt(np.square(weight, dtype=np.float64).mean())) or 1.0
    places = np.searchsorted(BINS, np.abs(values - weight).ravel() / rms)
    return tuple(np.bincount(places, minlength=len(BINS) + 1).tolist())


def relative_error(weight: Floats, values: Floats) -> float:
    """Frobenius; 0 for a weight of zeros that stayed so."""
    size = float(np.sqrt(np.square(weight, dtype=np.float64).sum()))
    lost = float(np.sqrt(np.square(values - weight, dtype=np.float64).sum()))
    return lost / size if size else lost
