"""From logits to a token: greedy, or temperature, top-k and top-p with a random stream of each request's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.asked import settle
from runtime.errors import InputError, raise_all


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None  # None: a new random stream each time

    def __post_init__(self) -> None:
        settle(self)
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


@dataclass(frozen=True, slots=True)
class Kept:
    """A distribution: the tokens that may be picked, likeliest first, and their probabilities, which sum to 1."""

    ids: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    def pick(self, random: float) -> int:
        """The token at `random`, 0..1, of the cumulated probabilities."""
        place = int(np.searchsorted(np.cumsum(self.probabilities), random, side="right"))
        return int(self.ids[min(place, len(self.ids) - 1)])

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """The probabilities of these tokens; 0 for one that is not kept."""
        size = int(max(self.ids.max(), ids.max())) + 1
        wide = np.zeros(size)
        wide[self.ids] = self.probabilities
        return wide[ids]


@dataclass(frozen=True, slots=True)
class Draft:
    """A token guessed before the logits that decide are known."""

    token_id: int
    drawn_from: Kept | None  # None: the likeliest, under greedy decoding


class Sampler:
    """One request's sampler, with a random stream of its own: other rows never change what it draws."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: NDArray[np.float32], draft: Draft | None = None) -> int:
        """Pick a token id from logits [V]: with a draft either that or another one, with the same probabilities."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        target = distribution(logits, self.sampling)
        if draft is None or draft.drawn_from is None:
            return target.pick(self._random.random())
        return accept_or_redraw(target, draft.drawn_from, draft.token_id, self._random)

    def draft(self, logits: NDArray[np.float32]) -> Draft:
        """Guess the next token from other logits [V] than those that will decide, as if they did."""
        if self.sampling.temperature == 0:
            return Draft(int(logits.argmax()), None)
        drawn_from = distribution(logits, self.sampling)
        return Draft(drawn_from.pick(self._random.random()), drawn_from)


def accept_or_redraw(target: Kept, drawn_from: Kept, drafted: int, random: np.random.Generator) -> int:
    """A token of distribution p = `target`, given one that was drawn from q = `drawn_from`.

    The draft d is accepted with probability min(1, p(d) / q(d)); else a token is drawn from max(p - q, 0),
    renormalised. Token t then comes with probability min(p(t), q(t)) + max(p(t) - q(t), 0) = p(t).
    (Speculative sampling: Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.)
    """
    one = np.array([drafted])
    if random.random() * drawn_from.of(one)[0] < target.of(one)[0]:
        return drafted
    rest = np.maximum(target.probabilities - drawn_from.of(target.ids), 0)
    total = rest.sum()
    if total <= 0:  # p and q differ by rounding only
        return target.pick(random.random())
    return Kept(target.ids, rest / total).pick(random.random())


def distribution(logits: NDArray[np.float32], sampling: Sampling) -> Kept:
    """What a token is drawn from."""
    ids, probabilities = kept(logits, sampling)
    return Kept(ids, probabilities / probabilities.sum())


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
