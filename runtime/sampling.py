"""From logits to a token: greedy, or temperature, top-k and top-p with a random stream of each request's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, raise_all


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None  # None: a new random stream each time

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(_problem("temperature", self.temperature, "a finite number >= 0"))
        if self.top_k is not None and self.top_k < 1:
            problems.append(_problem("top_k", self.top_k, "at least 1"))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(_problem("top_p", self.top_p, "more than 0, at most 1"))
        if self.seed is not None and self.seed < 0:
            problems.append(_problem("seed", self.seed, "at least 0"))
        if self.temperature == 0 and (self.top_k, self.top_p, self.seed) != (None, None, None):
            problems.append(_problem("top_k, top_p and seed mean nothing at temperature", 0, "a temperature above 0"))
        raise_all("sampling", problems)


class Sampler:
    """One request's sampler. Each token takes one random number, so other rows never change what it draws."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Pick a token id from logits [V]."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = kept(logits, self._sampling)
        drawn = self._random.random() * probabilities.sum()
        place = int(np.searchsorted(np.cumsum(probabilities), drawn, side="right"))
        return int(ids[min(place, len(ids) - 1)])


def kept(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens sampling may pick, likeliest first, and their probabilities before renormalising.

    Top-k keeps the k likeliest; top-p then keeps the fewest whose share of those reaches p. Ties go to the lower id.
    """
    k = min(sampling.top_k or len(logits), len(logits))
    ids = np.argsort(-logits, kind="stable")[:k]
    probabilities = softmax(logits[ids], sampling.temperature)
    if sampling.top_p is not None and sampling.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        reach = max(1, int(np.searchsorted(before, sampling.top_p, side="left")))
        ids, probabilities = ids[:reach], probabilities[:reach]
    return ids, probabilities


def softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Probabilities [V] in float64; a tiny temperature tends to the argmax without overflow."""
    shifted = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # a difference over a tiny temperature may be -inf: probability 0
        weights = np.exp(shifted / temperature)
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def _problem(what: str, got: object, need: str) -> InputError:
    return InputError(what, got=str(got), need=need, code="E_SAMPLING")
