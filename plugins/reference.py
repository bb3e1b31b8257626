"""What the two operators mean, in numpy: float32 inside, rounded once at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins.operators import GateRules

Array = NDArray[Any]


def gate_scalings(logits: Array, rules: GateRules) -> Array:
    """Logits [..., E] -> scalings [..., E] of the same dtype; the steps are told at `GateRules`."""
    x = logits.astype(np.float32)
    if rules.softmax:
        x = softmax(x / np.float32(rules.temperature), np.full(x.shape, True))
    if rules.top_k:
        order = np.argsort(-x, axis=-1, kind="stable")  # equal values: lower expert first
        rank = np.argsort(order, axis=-1, kind="stable")
        x = np.where(rank < rules.top_k, x, np.float32(0))
    if rules.topk_softmax:
        x = softmax(x, x != 0)
    return x.astype(logits.dtype)


def softmax(x: Array, mask: Array) -> Array:
    """Softmax over the masked-in entries of the last axis; 0 elsewhere, and 0 for a row without any."""
    lowest = np.finfo(np.float32).min
    top = np.where(mask, x, lowest).max(-1, keepdims=True)
    exp = np.exp(np.where(mask, x - top, lowest), dtype=np.float32) * mask
    total: Array = np.maximum(exp.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    return exp / total


def gated_low_rank(base: Array, x: Array, a: Array, b: Array, factors: Array) -> Array:
    """base [..., out] + ((x [..., in] aT) * factors [..., R]) b, with a [R, in] and b [R, out].

    All of it finite: a kernel does not read the rows of a and b whose factor is 0.
    """
    hidden = (x.astype(np.float32) @ a.astype(np.float32).T) * factors
    update: Array = hidden @ b.astype(np.float32)
    return (base.astype(np.float32) + update).astype(base.dtype)
