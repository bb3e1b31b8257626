"""Requests that come and go: each gets what it gets alone, in shared steps, within its memory, in its turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import GenerateOptions, InputError, MachineError, Model, NumericError, Routed, Sampling, complete, load
from runtime.backends.ort import OrtSession
from runtime.decode import Decode, DecodeMode, Freeze
from runtime.generate import generate, requests_of
from runtime.rows import Rows, StepResult
from runtime.scheduler import Scheduler, SchedulerOptions
from runtime.session import StepLimits
from runtime.signature import CacheStyle
from runtime.tickets import Ticket
from tests.runtime.tiny_bundles import BYTE_SHAPE, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, tiny_weights
from tests.same_tokens import Logits, Ties, seen_logits

SMALL = TinyShape(vocab=40, max_positions=200)
VARIANTS = ("xlora", "xlora", "math", "base")
STYLES = (CacheStyle.APPEND, CacheStyle.ALIAS)
MODES = ("exact", "paired", "auto")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[CacheStyle, Model]]:
    opened = {}
    for style in STYLES:
        shape = dataclasses.replace(SMALL, cache=style)
        path = tiny_bundle(tmp_path_factory.mktemp("bundles") / style, shape, tokenizer=False, end=())
        opened[style] = load(path, threads=1)
    yield opened
    for model in opened.values():
        model.close()


@pytest.fixture
def model(models: dict[CacheStyle, Model]) -> Model:
    return models[CacheStyle.APPEND]


def asked(random: np.random.Generator, count: int, longest: int = 30) -> list[Routed]:
    """Prompts of random tokens, lengths and variants."""
    lengths = random.integers(1, longest, count)
    return [Routed(random.integers(0, SMALL.vocab, n).tolist(), str(random.choice(VARIANTS))) for n in lengths]


class Run:
    """A scheduler with its requests; after each step it looks at what must always hold."""

    def __init__(self, model: Model, options: SchedulerOptions, asked: Sequence[Routed], how: GenerateOptions) -> None:
        self.model, self.options = model, options
        self.scheduler = Scheduler(model.turn, options)
        self.requests, self.ways = requests_of(model, asked, how, None)
        self.tickets: list[Ticket | None] = [None] * len(asked)
        self.steps = 0

    def submit(self, number: int) -> Ticket:
        way = self.ways[number]
        ticket = self.scheduler.submit(self.requests[number], way.route.routing, way.session)
        self.tickets[number] = ticket
        return ticket

    def step(self) -> list[int]:
        """The prompts that got a token."""
        events = self.scheduler.step()
        self.steps += 1
        assert self.scheduler.kv_bytes == held_bytes(self.model)
        assert self.scheduler.kv_bytes <= (self.options.kv_budget or 1 << 40)
        return [event.prompt for event in events]

    def to_end(self) -> None:
        while not self.scheduler.is_idle:
            self.step()
            assert self.steps < 5_000


def held_bytes(model: Model) -> int:
    """What the K/V arrays really take."""
    session: Any = model.session
    return sum(group.memory.nbytes for group in session._caches.groups)


def alone(model: Model, asked: Sequence[Routed], how: GenerateOptions) -> dict[int, Logits]:
    """What each prompt's tokens are chosen from when it runs alone, in exact decoding."""
    found = {}
    for number, prompt in enumerate(asked):
        with seen_logits() as seen:
            complete(model, [prompt], dataclasses.replace(how, decode="exact"))
        found[number] = seen[0]
    return found


def options_for(decode: str, **others: Any) -> SchedulerOptions:
    return SchedulerOptions(decode=Decode(DecodeMode(decode)), **others)


# --- each as alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("decode", MODES)
def test_random_arrivals_get_what_they_get_alone(models: dict[CacheStyle, Model], style: CacheStyle, decode: str) -> None:
    """Random lengths, variants, rows, budgets, chunks, arrivals and cancellations."""
    model, ties = models[style], Ties()
    random = np.random.default_rng([STYLES.index(style), MODES.index(decode)])
    for _ in range(5):
        prompts, how = asked(random, 12), GenerateOptions(max_new_tokens=int(random.integers(1, 14)))
        want = alone(model, prompts, how)
        slot = model.session.cache_bytes(1, 64)
        options = options_for(
            decode,
            rows=int(random.integers(1, 7)),
            kv_budget=random.choice([None, int(slot * random.integers(2, 9))]),
            chunk_tokens=int(random.integers(1, 20)),
        )
        run = Run(model, options, prompts, how)
        cancelled = set(random.choice(12, 3, replace=False).tolist())
        with seen_logits() as seen:
            for number in range(len(prompts)):
                run.submit(number)
                for _ in range(int(random.integers(0, 5))):
                    run.step()
                if number in cancelled:
                    victim = run.tickets[int(random.integers(0, number + 1))]
                    assert victim is not None
                    run.scheduler.cancel(victim)
            run.to_end()
        for number, ticket in enumerate(run.tickets):
            assert ticket is not None
            assert ticket.is_ended
            assert ticket.error is None
            got = seen.get(number, [])
            if ticket.is_cancelled:
                ties.compare(want[number][: len(got)], got, f"cancelled prompt {number}, {decode}")
            else:
                ties.compare(want[number], got, f"prompt {number}, {decode}")
        assert run.scheduler._lease is not None
        assert not run.scheduler._lease.pool._places
    ties.check()
