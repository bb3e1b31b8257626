"""One prompt on its way: what it has produced so far, and when it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from runtime.decode import Divergence, FoldCosts, StepCount
from runtime.lookup import looked_up
from runtime.sampling import Draft, Kept, Sampler
from runtime.text import StopFinder, TextStream
from runtime.token_rules import TokenRules


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # the model's end token, a stop token or a stop string
    LENGTH = "length"  # max_new_tokens


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token. The texts of a prompt's events, joined, are its text; a token inside a character brings none."""

    prompt: int  # index into the prompts
    token_id: int
    text: str
    finish_reason: FinishReason | None  # set on a prompt's last event
    seconds: float  # since its batch began, or since it left the queue of a scheduler


@dataclass(frozen=True, slots=True)
class Timings:
    """Counts and seconds of one completion; the rows of a batch share their time."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float  # prefill
    total_seconds: float
    drafts: int = 0  # tokens guessed ahead
    accepted: int = 0  # of these, those that came
    steps: int = 0  # of its session from its first to its last, whoever shared them
    exact_steps: int = 0  # and those that `exact` would have taken


@dataclass(frozen=True, slots=True)
class Completion:
    """One prompt's whole answer. token_ids include an end token, text does not."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    timings: Timings
    variant: str | None  # the one asked for by name
    divergence: Divergence | None = None  # from exact decoding, where it was asked for and scalings were frozen
    folded: FoldCosts | None = None  # where its scalings were folded


@dataclass(frozen=True, slots=True)
class Limits:
    """When a request ends."""

    max_new_tokens: int
    stop_token_ids: frozenset[int]
    stop: tuple[str, ...]


class Request:
    """A prompt's tokens, variant, sampler, text and end."""

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        limits: Limits,
        sampler: Sampler,
        stream: TextStream | None,
        variant: str | None = None,
        rules: TokenRules | None = None,
    ) -> None:
        self.number = number
        self.prompt = tuple(prompt)
        self.variant = variant
        self.finish_reason: FinishReason | None = None
        self.events: list[TokenEvent] = []
        self.divergence: Divergence | None = None
        self.folded: FoldCosts | None = None
        self.steps = StepCount()
        self._ahead: deque[Draft] = deque()  # of the next tokens, each if those before it come
        self._drafts = self._accepted = 0
        self._limits, self._sampler, self._stream = limits, sampler, stream
        self._stops = StopFinder(limits.stop)
        self._rules = rules
        room = 0 if rules is None else limits.max_new_tokens
        self._written = np.array([*self.prompt, *[0] * room], np.int64)  # prompt, new tokens, drafts: for the rules

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def pending(self) -> tuple[int, ...]:
        """The tokens the network has not seen yet: the prompt, then each new token, nothing at the end."""
        if self.is_done:
            return ()
        return (self.events[-1].token_id,) if self.events else self.prompt

    @property
    def most_fed(self) -> int:
        """How many tokens the network may see of it at most: the last new one is never fed back."""
        return len(self.prompt) + self._limits.max_new_tokens - 1

    @property
    def is_sampled(self) -> bool:
        """Whether its tokens are drawn at random."""
        return not self._sampler.sampling.is_greedy

    @property
    def wants_drafts(self) -> int:
        """How many guesses of the next tokens may help: they will be fed back, and the prompt has been."""
        return 0 if self.is_done or not self.events else self._limits.max_new_tokens - 1 - len(self.events)

    @property
    def wants_draft(self) -> bool:
        """Whether a guess of the next token may help."""
        return self.wants_drafts > 0

    def draft(self, logits: NDArray[np.float32], place: int = 0) -> int:
        """Guess the token `place` after the next from the scaling pass's logits [V]; `accept` takes it or leaves it.

        Guesses from that place on that were there are forgotten.
        """
        before = [*self._ahead][:place]
        draft = self._sampler.draft(self._ruled(logits, [each.token_id for each in before]))
        self._guess(before, [draft])
        return draft.token_id

    def look_up(self, count: int) -> list[int]:
        """Guess the next tokens by what followed the last ones earlier in the text, at most `count`."""
        found = looked_up([*self.prompt, *(event.token_id for event in self.events)], count)
        certain = self._sampler.sampling.is_greedy
        one = np.ones(1)
        self._guess([], [Draft(token, None if certain else Kept(np.array([token]), one)) for token in found])
        return found

    def _guess(self, before: Sequence[Draft], new: Sequence[Draft]) -> None:
        self._ahead = deque([*before, *new])
        self._drafts += len(new)

    def accept(self, logits: NDArray[np.float32], seconds: float) -> TokenEvent:
        """Choose the next token from logits [V] and settle what it means."""
        draft = self._ahead.popleft() if self._ahead else None
        token_id = self._sampler.choose(self._ruled(logits), draft)
        if draft is not None and draft.token_id == token_id:
            self._accepted += 1
        else:
            self._ahead.clear()  # they follow what did not come
        if self._rules is not None:
            self._written[len(self.prompt) + len(self.events)] = token_id
        text = self._settle(token_id)
        event = TokenEvent(self.number, token_id, text, self.finish_reason, seconds)
        self.events.append(event)
        return event

    def _ruled(self, logits: NDArray[np.float32], drafts: Sequence[int] = ()) -> NDArray[np.float32]:
        """Logits [V] after the rules, for the token that follows the text so far and these drafts."""
        if self._rules is None:
            return logits
        came = len(self.prompt) + len(self.events)
        self._written[came : came + len(drafts)] = drafts
        text = self._written[: came + len(drafts)]
        return self._rules.apply(logits, text, len(self.prompt), self._limits.max_new_tokens)

    def completion(self) -> Completion:
        """Everything, once it has ended."""
        assert self.finish_reason is not None
        first, last = self.events[0].seconds, self.events[-1].seconds
        return Completion(
            token_ids=tuple(event.token_id for event in self.events),
            text="".join(event.text for event in self.events),
            finish_reason=self.finish_reason,
            timings=Timings(
                len(self.prompt),
                len(self.events),
                first,
                last,
                self._drafts,
                self._accepted,
                self.steps.taken,
                self.steps.exact,
            ),
            variant=self.variant,
            divergence=self.divergence,
            folded=self.folded,
        )

    def _settle(self, token_id: int) -> str:
        """Set the finish reason if this token ends the request; the text that is certain now."""
        is_end = token_id in self._limits.stop_token_ids
        is_last = is_end or len(self.events) + 1 == self._limits.max_new_tokens
        text = self._text(token_id, is_end=is_end, is_last=is_last)
        if is_end or self._stops.is_hit:
            self.finish_reason = FinishReason.STOP
        elif is_last:
            self.finish_reason = FinishReason.LENGTH
        return text

    def _text(self, token_id: int, *, is_end: bool, is_last: bool) -> str:
        if self._stream is None:
            return ""
        text = "" if is_end else self._stops.push(self._stream.push(token_id))
        if is_last and not self._stops.is_hit:
            text += self._stops.push(self._stream.flush())
        if is_last and not self._stops.is_hit:
            text += self._stops.flush()
        return text
