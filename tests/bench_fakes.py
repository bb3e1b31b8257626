"""Workers of scripts/bench that answer at once, for tests of everything around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.benchmark.environments import Environments
from scripts.benchmark.layouts import Models
from scripts.benchmark.limit import Reads
from scripts.benchmark.process import Memory, WorkerError
from scripts.benchmark.results import Results
from scripts.benchmark.rounds import Run
from scripts.benchmark.subjects import Computes, Plan, Subject
from scripts.benchmark.tables import Found

PLAN = Plan((1, 8), (1, 2), (4, 2), new_tokens=4, rounds=3, usual_context=8)
GATED = Subject("gated", "fake", Computes.XLORA, "checkpoint")
PLAIN = Subject("plain", "fake", Computes.BASE, "checkpoint")
PEER = Subject("peer", "fake", Computes.XLORA, "checkpoint", most_tokens=3)
OTHER = Subject("other", "fake", Computes.NEAR_BASE, "checkpoint")
FAKES = (GATED, PLAIN, PEER, OTHER)
MEMORY = Memory(3 << 20, 2 << 20, 5 << 20)


@dataclass
class Fake:
    """Answers at once: token k of a row is k, but for what `tokens` changes; a step takes `seconds`."""

    name: str
    log: list[tuple[str, int, int]]
    seconds: float = 0.01
    fails_at: Callable[[int, int], str] = lambda context, batch: ""
    tokens: Callable[[int, int], int] = lambda row, step: step
    margin_of: Callable[[list[int]], float] = lambda prompt: 0.5
    dies: bool = False
    is_alive: bool = True
    closed: list[str] = field(default_factory=list)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "margins":
            return {"margins": [self.margin_of(request["prompt"])]}
        prompts, count = request["prompts"], request["new_tokens"]
        self.log.append((self.name, len(prompts[0]), len(prompts)))
        if message := self.fails_at(len(prompts[0]), len(prompts)):
            self.is_alive = not self.dies
            raise WorkerError(message)
        rows = [[self.tokens(row, step) for step in range(count)] for row in range(len(prompts))]
        return {"tokens": rows, "seconds": [self.seconds * (step + 5) for step in range(count)]}

    def memory(self) -> Memory:
        return MEMORY

    def close(self) -> None:
        self.closed.append(self.name)


@dataclass
class Fakes:
    """Starts fakes; remembers all that were asked and closed."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, Exception] = field(default_factory=dict)
    log: list[tuple[str, int, int]] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def __call__(self, subject: Subject, models: Models) -> tuple[Fake, dict[str, str]]:
        if subject.name in self.missing:
            raise self.missing[subject.name]
        self.started.append(subject.name)
        fake = Fake(subject.name, self.log, closed=self.closed, **self.settings.get(subject.name, {}))
        return fake, {"package": "1.0"}


def write_models(folder: Path) -> dict[int, Models]:
    """Checkpoints of which only the vocabulary is ever read."""
    for experts in PLAN.experts:
        base = folder / str(experts) / "checkpoint" / "base"
        base.mkdir(parents=True)
        (base / "config.json").write_text('{"vocab_size": 50}')
    return {experts: Models(folder / str(experts), experts, Environments(folder)) for experts in PLAN.experts}


def measured(
    models: dict[int, Models], fakes: Fakes, plan: Plan = PLAN, subjects: tuple[Subject, ...] = FAKES
) -> Found:
    run = Run(plan, subjects, models, fakes, lambda: 2e9, lambda line: None, Results())
    run.measure()
    reads = {(s.name, experts): Reads(10**7, 1000) for s in subjects for experts in plan.models()}
    return Found(plan, subjects, run.results, reads)
