"""What a run found: samples by subject and case, their medians and spreads, whose tokens agree, what went wrong."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from scripts.benchmark.process import Memory
from scripts.benchmark.subjects import Case, Subject

TIE_MARGIN = 1e-4  # of logits: products of other shapes sum in another order
UNTIMED = 2  # the first token is the prefill; the step after it binds memory


@dataclass(frozen=True, slots=True)
class Summary:
    """Of samples: the middle one, and the quarter of them on either side of it."""

    median: float
    low: float
    high: float
    count: int


def summary(samples: Sequence[float]) -> Summary:
    """Median and quartiles; those of one sample are itself."""
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, low, high, len(samples))


def first_milliseconds(seconds: Sequence[float]) -> float:
    """To the first token."""
    return seconds[0] * 1e3


def step_milliseconds(seconds: Sequence[float]) -> float:
    """Mean of the steps after the untimed ones: what grows or stalls within a sample counts."""
    return (seconds[-1] - seconds[UNTIMED - 1]) / (len(seconds) - UNTIMED) * 1e3


@dataclass(frozen=True, slots=True)
class Agreement:
    """One subject's tokens of one case against the reference's."""

    reference: str
    tokens: int  # compared
    differs_at: int | None = None  # the first step at which a row has another token
    margin: float | None = None  # of the reference's best logit there; None: it cannot tell

    @property
    def is_same(self) -> bool:
        """Equal, or apart only after a tie."""
        return self.differs_at is None or self.is_tie

    @property
    def is_tie(self) -> bool:
        """Whether the reference itself could have gone either way."""
        return self.margin is not None and self.margin < TIE_MARGIN

    def __str__(self) -> str:
        if self.differs_at is None:
            return f"same {self.tokens}"
        margin = "" if self.margin is None else f", margin {self.margin:.1g}"
        return f"{'tie' if self.is_tie else 'differs'} at {self.differs_at}{margin}"


def first_differences(wanted: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(row, step) of the first step at which each row that differs does so, as far as both go."""
    found = []
    for row, (one, other) in enumerate(zip(wanted, got, strict=True)):
        steps = [step for step, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
        if steps:
            found.append((row, steps[0]))
    return found


Key = tuple[str, Case]  # a subject's name and a case


@dataclass(slots=True)
class Results:
    """Filled round by round."""

    first: dict[Key, list[float]] = field(default_factory=dict)  # ms to the first token
    step: dict[Key, list[float]] = field(default_factory=dict)  # ms for one token of every row
    failures: dict[Key, str] = field(default_factory=dict)
    agreements: dict[Key, Agreement] = field(default_factory=dict)
    left_out: dict[tuple[str, int], str] = field(default_factory=dict)  # by experts; why it was not started
    versions: dict[str, dict[str, str]] = field(default_factory=dict)  # subject -> package -> version
    loaded: dict[tuple[str, int], list[Memory]] = field(default_factory=dict)  # by experts; after loading
    used: dict[tuple[str, int], list[Memory]] = field(default_factory=dict)  # after the round's cases
    drafts: dict[tuple[str, Case], list[tuple[int, int]]] = field(default_factory=dict)  # that came true, all
    bandwidth: list[float] = field(default_factory=list)  # bytes a second

    def add(self, subject: Subject, case: Case, seconds: Sequence[float]) -> None:
        """One sample."""
        self.first.setdefault((subject.name, case), []).append(first_milliseconds(seconds))
        self.step.setdefault((subject.name, case), []).append(step_milliseconds(seconds))

    def accepted(self, subject: str, case: Case) -> float | None:
        """The share of drafts that came true, where any were made."""
        counts = self.drafts.get((subject, case), [])
        made = sum(drafts for _, drafts in counts)
        return sum(right for right, _ in counts) / made if made else None

    def step_summary(self, subject: str, case: Case) -> Summary | None:
        """ms of a decode step, where it ran."""
        samples = self.step.get((subject, case))
        return summary(samples) if samples else None
