"""What comparisons measure, position by position, and the value of a measure that lies highest against its limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import Check

Numbers = NDArray[np.floating[Any]]
Wide = NDArray[np.float64]


@dataclass(slots=True)
class Worst:
    """The value of one measure that lies highest against its limit, and where it was met."""

    limit: float
    value: float = 0.0
    where: str = ""
    noise: float | None = None  # from which the limit was taken

    def see(self, value: float, where: str, limit: float, noise: float | None = None) -> None:
        """Keep the worse; NaN counts as infinite. Only noise moves a limit."""
        value = float("inf") if np.isnan(value) else float(value)
        is_first = not self.where
        if is_first or value * self.limit > self.value * limit or (limit == 0 and value > self.value):
            self.value, self.where, self.limit, self.noise = value, where, limit, noise

    def check(self, name: str) -> Check:
        """The measure as reports keep it."""
        value = float(min(self.value, np.finfo(np.float64).max))  # JSON has no infinity
        passed = self.value <= self.limit
        return Check(name=name, value=value, limit=self.limit, passed=passed, where=self.where, noise=self.noise)


def logsumexp(logits: Numbers) -> Wide:
    """[T] of logits [T, V], in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    result: Wide = top + np.log(np.exp(wide - top[:, None]).sum(axis=-1))
    return result


def divergence(reference: Numbers, got: Numbers) -> Wide:
    """KL(reference || got) per position [T] in nats, over the full vocabulary [T, V] in float64; NaN is infinite."""
    expected = reference - logsumexp(reference)[:, None]
    result: Wide = (np.exp(expected) * (expected - (got - logsumexp(got)[:, None]))).sum(-1)
    return np.where(np.isnan(result), np.inf, result)


def logit_difference(reference: Numbers, got: Numbers) -> Wide:
    """The largest |d| / (1 + |ref|) per position [T]; NaN is infinite."""
    return _worst(np.abs(got - reference.astype(np.float64)) / (1 + np.abs(reference)))


def gate_difference(reference: Numbers, got: Numbers) -> Wide:
    """The largest |d| per position [T]; relative above 1, where a gate without softmax may lie. NaN is infinite."""
    return _worst(np.abs(got - reference.astype(np.float64)) / np.maximum(np.abs(reference), 1))


def flips(reference: Numbers, got: Numbers, margin: float) -> NDArray[np.bool_]:
    """[T]: where the argmax differs although the reference's top two lie further apart than `margin`."""
    second, first = np.partition(reference, -2, axis=-1)[:, -2:].T
    result: NDArray[np.bool_] = (got.argmax(-1) != reference.argmax(-1)) & (first - second > margin)
    return result


def _worst(apart: Wide) -> Wide:
    result: Wide = np.where(np.isnan(apart), np.inf, apart).reshape(len(apart), -1).max(-1)
    return result
