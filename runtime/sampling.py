"""From logits to a token: greedy, or temperature, top-k, top-p and more with a random stream of each request's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.asked import settle
from runtime.errors import InputError, raise_all


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy. None: as the base's generation config says, else not at all."""

    temperature: float | None = None  # None, and the base's config does not sample: greedy
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None  # None: a new random stream each time
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float | None = None  # from here on: also of greedy decoding
    no_repeat_ngram_size: int | None = None  # 0: none
    suppress_tokens: tuple[int, ...] | None = None
    min_new_tokens: int | None = None

    def __post_init__(self) -> None:
        settle(self)
        problems = []
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(_problem("temperature", self.temperature, "a finite number >= 0"))
        if self.top_k is not None and self.top_k < 1:
            problems.append(_problem("top_k", self.top_k, "at least 1"))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(_problem("top_p", self.top_p, "more than 0, at most 1"))
        if self.seed is not None and self.seed < 0:
            problems.append(_problem("seed", self.seed, "at least 0"))
        if self.temperature == 0 and self.is_of_random:
            problems.append(meaningless())
        problems += _rule_problems(self)
        raise_all("sampling", problems)

    @property
    def is_of_random(self) -> bool:
        """Whether something is set that only a random choice has."""
        cuts = (self.top_k, self.top_p, self.min_p, self.typical_p, self.epsilon_cutoff, self.eta_cutoff)
        return any(value is not None for value in (*cuts, self.seed))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return not self.temperature


def meaningless() -> InputError:
    """Why settings of a random choice are refused under greedy decoding."""
    return _problem("top_k, top_p, min_p and seed mean nothing at temperature", 0, "a temperature above 0")


def _rule_problems(sampling: Sampling) -> list[InputError]:
    problems = []
    if sampling.min_p is not None and not 0 <= sampling.min_p <= 1:
        problems.append(_problem("min_p", sampling.min_p, "at least 0, at most 1"))
    for name in ("typical_p", "epsilon_cutoff", "eta_cutoff"):
        value = getattr(sampling, name)
        if value is not None and not 0 < value < 1:
            problems.append(_problem(name, value, "more than 0, less than 1"))
    penalty = sampling.repetition_penalty
    if penalty is not None and not (math.isfinite(penalty) and penalty > 0):
        problems.append(_problem("repetition_penalty", penalty, "a finite number > 0"))
    for name in ("no_repeat_ngram_size", "min_new_tokens"):
        value = getattr(sampling, name)
        if value is not None and value < 0:
            problems.append(_problem(name, value, "at least 0"))
    return problems


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
        if self.sampling.is_greedy:
            return int(logits.argmax())
        target = distribution(logits, self.sampling)
        if draft is None or draft.drawn_from is None:
            return target.pick(self._random.random())
        return accept_or_redraw(target, draft.drawn_from, draft.token_id, self._random)

    def draft(self, logits: NDArray[np.float32]) -> Draft:
        """Guess the next token from other logits [V] than those that will decide, as if they did."""
        if self.sampling.is_greedy:
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

    Top-k keeps the k likeliest; top-p then keeps the fewest whose share of those reaches p; then come min-p, typical-p
    and the cutoffs, in the order of transformers' `_get_logits_processor`. Ties go to the lower id. A logit of -inf is
    never picked; InputError where all are.
    """
    temperature = sampling.temperature or 0.0
    k = min(sampling.top_k or len(logits), len(logits))
    ids = np.argsort(-logits, kind="stable")[:k]
    if logits[ids[-1]] == -np.inf:
        ids = ids[logits[ids] > -np.inf]
        if not len(ids):
            raise InputError("the settings of this request leave no token to choose", fix="suppress or forbid fewer")
    probabilities = softmax(logits[ids], temperature)
    if sampling.top_p is not None and sampling.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        reach = max(1, int(np.searchsorted(before, sampling.top_p, side="left")))
        ids, probabilities = ids[:reach], probabilities[:reach]
    for value, cut in (
        (sampling.min_p, likely_enough),
        (sampling.typical_p, typical),
        (sampling.epsilon_cutoff, over_epsilon),
        (sampling.eta_cutoff, over_eta),
    ):
        if value is not None:
            stays = cut(probabilities / probabilities.sum(), value)
            ids, probabilities = ids[stays], probabilities[stays]
    return ids, probabilities


Mask = NDArray[np.bool_]


def likely_enough(probabilities: NDArray[np.float64], share: float) -> Mask:
    """Those of at least this share of the likeliest (transformers' MinPLogitsWarper)."""
    return np.asarray(probabilities >= share * probabilities[0])


def typical(probabilities: NDArray[np.float64], mass: float) -> Mask:
    """The fewest whose surprise is nearest the entropy and that have this mass (TypicalLogitsWarper)."""
    surprise = -np.log(np.maximum(probabilities, 1e-300))
    away = np.abs(surprise - (probabilities * surprise).sum())
    order = np.argsort(away, kind="stable")
    last = min(int((np.cumsum(probabilities[order]) < mass).sum()), len(order) - 1)
    return np.asarray(away <= away[order[last]])


def over_epsilon(probabilities: NDArray[np.float64], epsilon: float) -> Mask:
    """Those of at least this probability, and the likeliest (EpsilonLogitsWarper)."""
    return np.asarray((probabilities >= epsilon) | (probabilities == probabilities[0]))


def over_eta(probabilities: NDArray[np.float64], epsilon: float) -> Mask:
    """The same with a limit that falls as the entropy grows (EtaLogitsWarper)."""
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum()
    return over_epsilon(probabilities, min(epsilon, math.sqrt(epsilon) * math.exp(-entropy)))


def softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Probabilities [V] in float64; a tiny temperature tends to the argmax without overflow."""
    shifted = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # a difference over a tiny temperature may be -inf: probability 0
        weights = np.exp(shifted / temperature)
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def _problem(what: str, got: object, need: str) -> InputError:
    return InputError(what, got=str(got), need=need, code="E_SAMPLING")
