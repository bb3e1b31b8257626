"""When drafts pay: `--decode auto` goes by the drafts that came true and by the seconds its steps took."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from time import perf_counter

WINDOW = 32  # drafts a row, and steps of each kind, that count
STRETCH, LEAST_STRETCH = 8, 3  # tokens of one try with drafts: of one row; of rows that tell more at a time
EVERY = 64  # tokens from one try of the other way to the next


class StepKind(StrEnum):
    """A step of one new token a row."""

    SCALING = "scaling"  # the scaling pass alone
    DRAFTING = "drafting"  # the same with logits, to draft from
    MAIN = "main"  # the main pass alone
    PAIRED = "paired"  # the main pass beside the scaling pass of the drafts


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """What each kind of step takes."""

    scaling: float
    drafting: float
    main: float
    paired: float


def drafts_pay(accepted: float, rows: int, seconds: StepSeconds) -> bool:
    """Whether a token costs less in `paired` than in `exact`, where this share of drafts comes true.

    One wrong draft among the rows is enough for another scaling pass; rows are taken to be independent.
    """
    some_row_misses = 1 - accepted**rows
    return seconds.paired + some_row_misses * seconds.drafting < seconds.scaling + seconds.main


def stretch_of(rows: int) -> int:
    """Tokens of one try with drafts: enough drafts to judge by, and steps to time, of which the first may not count."""
    return max(LEAST_STRETCH, STRETCH // max(rows, 1))


class Pace:
    """Says for each token whether to draft.

    It begins with a stretch of drafts. Later it follows `drafts_pay`, and now and then tries the other way, since texts
    change and steps grow: a stretch of drafts, or, where nothing was timed for long, a token without.
    """

    def __init__(self, rows: int, clock: Callable[[], float] = perf_counter) -> None:
        self._drafts: deque[bool] = deque(maxlen=WINDOW * rows)
        self._seconds: dict[StepKind, deque[float]] = {kind: deque(maxlen=WINDOW) for kind in StepKind}
        self._timed_at: dict[StepKind, int] = {}  # token
        self._clock, self._token, self._stretch = clock, 0, 0

    def drafts(self, rows: int) -> bool:
        """Whether this token, of so many rows under the gate, is to be decoded with drafts. Asked once a token."""
        self._token += 1
        if self._token == 1:
            self._stretch = stretch_of(rows)
        if self._stretch:
            self._stretch -= 1
            return True
        if self._is_old(StepKind.MAIN) or (self._is_old(StepKind.SCALING) and self._is_old(StepKind.DRAFTING)):
            return False
        if self._is_old(StepKind.PAIRED) or not self._drafts:
            self._drafts.clear()  # they are of another part of the text
            self._stretch = stretch_of(rows) - 1
            return True
        return drafts_pay(sum(self._drafts) / len(self._drafts), rows, self._typical())

    def saw_draft(self, *, came_true: bool) -> None:
        """A draft met its token."""
        self._drafts.append(came_true)

    @contextmanager
    def timed(self, kind: StepKind) -> Iterator[None]:
        """Time a step of one token a row. The first of its kind also binds memory and does not count."""
        began = self._clock()
        yield
        if kind in self._timed_at:
            self._seconds[kind].append(self._clock() - began)
        self._timed_at[kind] = self._token

    def _is_old(self, kind: StepKind) -> bool:
        return not self._seconds[kind] or self._token - self._timed_at[kind] > EVERY

    def _typical(self) -> StepSeconds:
        found = {kind: median(seconds) for kind, seconds in self._seconds.items() if seconds}
        drafting = found.get(StepKind.DRAFTING, found.get(StepKind.SCALING, 0.0))
        scaling = found.get(StepKind.SCALING, drafting)
        return StepSeconds(scaling, drafting, found[StepKind.MAIN], found[StepKind.PAIRED])
