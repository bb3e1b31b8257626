"""Rules that change logits by the text before them, each as transformers' logits processor of the same name does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What `model.generate` does to logits before a token is chosen; the defaults do nothing."""

    end_token_ids: TokenIds = ()  # what the lengths hold back, and what exponential decay favours
    sequence_bias: tuple[tuple[TokenIds, float], ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[TokenIds, ...] = ()
    min_length: int = 0  # prompt and new tokens
    min_new_tokens: int | None = None  # in the place of min_length
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: TokenIds = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: TokenIds = ()
    begin_suppress_tokens: TokenIds = ()

    @property
    def do_nothing(self) -> bool:
        """Whether logits stay as they are."""
        return self == TokenRules(self.end_token_ids) or self == TokenRules(self.end_token_ids, min_new_tokens=0)

    def apply(self, logits: Floats, text: Ids, prompt: int, most_new: int) -> Floats:
        """A changed copy of logits [V] for the token after `text` [T], whose first `prompt` tokens are the prompt.

        `most_new`: how many tokens the request may have. The order is that of transformers'
        `GenerationMixin._get_logits_processor`, and matters: a forced token stays forced, a suppressed one does not.
        """
        scores = logits.astype(np.float32)  # a copy
        if self.sequence_bias:
            scores += _bias(self.sequence_bias, text, len(scores))
        if self.repetition_penalty != 1:
            _penalise(scores, text, self.repetition_penalty)
        if self.no_repeat_ngram_size:
            scores[_repeating(text, self.no_repeat_ngram_size)] = -np.inf
        if self.bad_words_ids:
            words = [word for word in self.bad_words_ids if len(word) != 1 or word[0] not in self.end_token_ids]
            scores += _bias(tuple((word, -np.inf) for word in words), text, len(scores))
        least = self.min_length if self.min_new_tokens is None else prompt + self.min_new_tokens
        if len(text) < least:
            scores[self._within(self.end_token_ids, scores)] = -np.inf
        self._force(scores, len(text), prompt + most_new)
        if self.remove_invalid_values:
            limits = np.finfo(np.float32)
            np.nan_to_num(scores, copy=False, nan=0.0, posinf=float(limits.max), neginf=float(limits.min))
        self._favour_the_end(scores, len(text) - prompt)
        scores[self._within(self.suppress_tokens, scores)] = -np.inf
        begin = prompt if prompt > 1 or self.forced_bos_token_id is None else prompt + 1
        if len(text) == begin:
            scores[self._within(self.begin_suppress_tokens, scores)] = -np.inf
        return scores

    def _force(self, scores: Floats, length: int, longest: int) -> None:
        """ForcedBOSTokenLogitsProcessor: after a text of one token; ForcedEOSTokenLogitsProcessor: the last token."""
        forced: TokenIds = ()
        if self.forced_bos_token_id is not None and length == 1:
            forced = (self.forced_bos_token_id,)
        if self.forced_eos_token_ids and length == longest - 1:
            forced = self.forced_eos_token_ids
        if forced:
            scores[:] = -np.inf
            scores[list(forced)] = 0

    def _favour_the_end(self, scores: Floats, new: int) -> None:
        """ExponentialDecayLengthPenalty: end tokens grow beyond a number of new tokens."""
        if self.exponential_decay_length_penalty is None:
            return
        start, factor = self.exponential_decay_length_penalty
        ends = self._within(self.end_token_ids, scores)
        if new <= start or not ends:
            return
        now = scores[ends]
        with np.errstate(over="ignore", invalid="ignore"):  # of what `remove_invalid_values` made finite
            more = np.abs(now) * np.float32(factor ** (new - start) - 1)
        scores[ends] = now + np.where(np.isfinite(now), more, np.float32(0))

    @staticmethod
    def _within(ids: TokenIds, scores: Floats) -> list[int]:
        """Those that are tokens: a config may name others, which transformers passes over."""
        return [token for token in ids if 0 <= token < len(scores)]


def _penalise(scores: Floats, text: Ids, penalty: float) -> None:
    """RepetitionPenaltyLogitsProcessor: of the prompt's tokens too, each once."""
    seen = scores[text]
    scores[text] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))


def _repeating(text: Ids, size: int) -> Ids:
    """NoRepeatNGramLogitsProcessor: the tokens that would end an n-gram that the text has already."""
    if len(text) < size:
        return text[:0]
    windows = sliding_window_view(text, size)
    last = text[len(text) + 1 - size :]
    found: Ids = windows[(windows[:, :-1] == last).all(axis=1), -1]
    return found


def _bias(biases: tuple[tuple[TokenIds, float], ...], text: Ids, vocab: int) -> Floats:
    """SequenceBiasLogitsProcessor: added to a sequence's last token where the text ends with those before it."""
    bias = np.zeros(vocab, np.float32)
    for sequence, value in biases:
        before = np.array(sequence[:-1], np.int64)
        if len(before) <= len(text) and np.array_equal(text[len(text) - len(before) :], before):
            bias[sequence[-1]] += np.float32(value)
    return bias
