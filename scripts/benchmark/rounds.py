"""The run: in each round every subject starts anew, and every case goes to all of them in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from scripts.benchmark.environments import EnvironmentMissingError
from scripts.benchmark.layouts import LayoutError, Models
from scripts.benchmark.process import Memory, Worker, WorkerError, environment_with
from scripts.benchmark.results import Agreement, Results, first_differences
from scripts.benchmark.subjects import Case, Computes, Plan, Subject

ROOT = Path(__file__).resolve().parents[2]
WORKERS = "scripts.benchmark.workers."


class Running(Protocol):
    """A worker that has loaded its model."""

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""

    def memory(self) -> Memory:
        """Of the process."""

    def close(self) -> None:
        """End it."""


Start = Callable[[Subject, Models], tuple[Running, dict[str, str]]]  # a loaded worker and its versions
Tokens = list[list[int]]


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts workers as processes."""

    threads: int
    logs: Path

    def __call__(self, subject: Subject, models: Models) -> tuple[Running, dict[str, str]]:
        """A worker that has loaded its model. One that cannot load is gone again."""
        python = models.environments.python(subject.environment)
        path = models.path(subject.model)
        self.logs.mkdir(parents=True, exist_ok=True)
        command = [python, "-m", WORKERS + subject.worker]
        log = self.logs / f"{subject.name.replace(' ', '-')}.log"
        worker = Worker(command, log, environment_with(self.threads, ROOT), ROOT)
        request = {"do": "load", "model": str(path), "threads": self.threads, **subject.settings}
        try:
            return worker, worker.ask(request)["versions"]
        except WorkerError:
            worker.close()
            raise


def rotated(subjects: Sequence[Subject], turn: int) -> list[Subject]:
    """The same order from another beginning, so that nobody always follows the same neighbour."""
    start = turn % len(subjects) if subjects else 0
    return [*subjects[start:], *subjects[:start]]


@dataclass(slots=True)
class Run:
    """One run's parts; `measure` fills `results`."""

    plan: Plan
    subjects: tuple[Subject, ...]
    models: dict[int, Models]  # by number of experts
    start: Start
    read: Callable[[], float]  # memory bandwidth now, bytes a second
    tell: Callable[[str], None]
    results: Results

    def measure(self) -> None:
        """All rounds, each over all models."""
        for turn in range(self.plan.rounds):
            for experts in self.plan.models():
                self.tell(f"round {turn + 1} of {self.plan.rounds}, {experts} experts")
                Round(self, turn, experts).measure()


class Round:
    """One round on one model: all its workers are alive from the beginning to the end."""

    def __init__(self, run: Run, turn: int, experts: int) -> None:
        self._run, self._turn, self._experts, self._results = run, turn, experts, run.results
        self._cases = run.plan.cases(experts)
        self._subjects = run.plan.subjects_for(self._cases[0], run.subjects)  # the same for all cases of a model
        self._workers: dict[str, Running] = {}
        self._vocab = 0

    def measure(self) -> None:
        """Start all, give every case to each of them in turn, end all."""
        try:
            for subject in rotated(self._subjects, self._turn):
                self._start(subject)
            for case in self._cases:
                self._measure_case(case)
            for name, worker in self._workers.items():
                if worker.is_alive:
                    self._results.used.setdefault((name, self._experts), []).append(worker.memory())
        finally:
            for worker in self._workers.values():
                worker.close()

    def _start(self, subject: Subject) -> None:
        """Load and warm up. What cannot be had is left out from now on."""
        place = (subject.name, self._experts)
        if place in self._results.left_out:
            return
        models = self._run.models[self._experts]
        try:
            worker, versions = self._run.start(subject, models)
        except (EnvironmentMissingError, LayoutError, WorkerError) as error:
            self._results.left_out[place] = str(error)
            self._run.tell(f"left out: {subject.name}: {error}")
            return
        self._workers[subject.name] = worker
        self._results.versions[subject.name] = versions
        self._results.loaded.setdefault(place, []).append(worker.memory())
        self._vocab = self._vocab or vocabulary(models)
        self._warm_up(subject)

    def _warm_up(self, subject: Subject) -> None:
        try:
            self._ask(subject, Case(1, 1, self._experts, 3))
        except WorkerError as error:
            self._run.tell(f"{subject.name} did not warm up: {error}")
            self._drop_dead(subject)

    def _measure_case(self, case: Case) -> None:
        self._results.bandwidth.append(self._run.read())
        tokens: dict[str, Tokens] = {}
        for subject in rotated(self._subjects, self._turn):
            key = (subject.name, case)
            if subject.name not in self._workers or key in self._results.failures:
                continue
            try:
                answer = self._ask(subject, case)
            except WorkerError as error:
                self._results.failures[key] = str(error)
                self._run.tell(f"{subject.name}: {case}: {error}")
                if self._drop_dead(subject):  # of this case; it can still do the others
                    self._start(subject)
                continue
            self._results.add(subject, case, answer["seconds"])
            if "drafts" in answer:
                self._results.drafts.setdefault(key, []).append(tuple(answer["drafts"]))
            tokens[subject.name] = answer["tokens"]
        self._compare(case, tokens)

    def _ask(self, subject: Subject, case: Case) -> dict[str, Any]:
        request = {"do": "generate", "prompts": case.prompts(self._vocab), "new_tokens": case.tokens_of(subject)}
        return self._workers[subject.name].ask(request)

    def _drop_dead(self, subject: Subject) -> bool:
        """Whether it died; it starts no more by itself."""
        if self._workers[subject.name].is_alive:
            return False
        self._workers.pop(subject.name).close()
        return True

    def _compare(self, case: Case, tokens: dict[str, Tokens]) -> None:
        """Hold everybody's tokens to the reference's; a worse finding of an earlier round stays."""
        for subject in self._subjects:
            reference = self._reference_for(subject, tokens)
            if subject.name not in tokens or reference is None or reference is subject:
                continue
            found = self._agreement(case, reference, tokens[reference.name], tokens[subject.name])
            known = self._results.agreements.get((subject.name, case))
            if known is None or known.is_same:
                self._results.agreements[subject.name, case] = found

    def _reference_for(self, subject: Subject, tokens: dict[str, Tokens]) -> Subject | None:
        """Who ran the case and computes what this one does, or what it approximates. The first of them."""
        kind = Computes.XLORA if subject.has_experts else Computes.BASE
        able = [other for other in self._subjects if other.computes is kind and other.name in tokens]
        return next(iter(able), None)

    def _agreement(self, case: Case, reference: Subject, wanted: Tokens, got: Tokens) -> Agreement:
        """The worst row's: one that differs without a tie, else a tie, else all are equal."""
        compared = min(len(wanted[0]), len(got[0]))
        worst = Agreement(reference.name, compared)
        for row, step in first_differences(wanted, got):
            margin = self._margin(reference, case.prompts(self._vocab)[row], wanted[row][: step + 1])
            worst = Agreement(reference.name, compared, step, margin)
            if not worst.is_tie:
                break
        return worst

    def _margin(self, reference: Subject, prompt: list[int], tokens: list[int]) -> float | None:
        """How sure the reference was of the last of these tokens."""
        try:
            answer = self._workers[reference.name].ask({"do": "margins", "prompt": prompt, "tokens": tokens})
        except WorkerError:  # only our workers know
            return None
        return float(answer["margins"][-1])


def vocabulary(models: Models) -> int:
    """Of the checkpoint."""
    config = json.loads((models.path("checkpoint") / "base" / "config.json").read_text())
    return int(config["vocab_size"])
