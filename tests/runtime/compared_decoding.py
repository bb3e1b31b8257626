"""One batch decoded in two ways, and requests that guess what a test wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from runtime import Completion, GenerateOptions, Model, NumericError, complete
from runtime.backends.ort import OrtSession
from runtime.request import Request
from runtime.rows import Rows, StepResult
from tests.same_tokens import Logits, Ties, seen_logits


def logits_of(
    model: Model, prompts: Sequence[Any], options: GenerateOptions
) -> tuple[dict[int, Logits], list[Completion]]:
    with seen_logits() as seen:
        found = complete(model, prompts, options)
    return seen, found


def compare(
    model: Model, prompts: Sequence[Any], options: GenerateOptions, decode: str, ties: Ties
) -> list[Completion]:
    """One batch in both ways."""
    want, _ = logits_of(model, prompts, dataclasses.replace(options, decode="exact"))
    got, found = logits_of(model, prompts, dataclasses.replace(options, decode=decode))
    for number in want:
        ties.compare(want[number], got[number], f"prompt {number}, {decode}")
    return found


def random_prompts(random: np.random.Generator, count: int, vocab: int, longest: int = 9) -> list[list[int]]:
    return [random.integers(0, vocab, random.integers(1, longest)).tolist() for _ in range(count)]


def draft_anything(monkeypatch: pytest.MonkeyPatch, guess: Callable[[], int]) -> None:
    """Greedy requests guess this."""
    draft = Request.draft

    def drafted(self: Request, logits: Any, place: int = 0) -> int:
        return draft(self, np.eye(len(logits), dtype=np.float32)[guess()], place)

    monkeypatch.setattr(Request, "draft", drafted)


class Failing(OrtSession):
    """Fails at the step of this number, before anything is computed."""

    fails, calls = 0, 0

    def step(self, rows: Rows) -> StepResult:
        self.calls += 1
        if self.calls == self.fails:
            raise NumericError("logits", (len(rows.counts) - 1,))
        return super().step(rows)
