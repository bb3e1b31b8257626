"""Prompts to tokens: every pass continues all rows by the tokens the network has not seen, until each has stopped.

Rows of one batch may be of different variants: each brings its own scalings. Graphs run in sessions of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from time import perf_counter

import numpy as np

from runtime.adapter_folder.problems import gathering
from runtime.adapter_pool import Generation
from runtime.asked import require_options
from runtime.decode import Decode, DecodeMode, StepCount
from runtime.errors import InputError, NumericError, raise_all
from runtime.fold import Folding
from runtime.folded import FoldedPasses
from runtime.frozen import FrozenText, frozen_divergence
from runtime.ladder import frozen_from, is_gated, open_ladder, stack_for
from runtime.model import Model
from runtime.passes import Ids, Passes
from runtime.prompts import GenerateOptions, Prompt, Routed, Way, decode_of, in_prompt, requests_of
from runtime.request import Completion, Request, TokenEvent
from runtime.scheduler import Scheduler, SchedulerOptions, can_schedule, run_to_end
from runtime.session import SlotSession
from runtime.signature import CacheStyle
from runtime.stacks import Stack


def generate(
    model: Model,
    prompts: Sequence[Prompt | Routed],
    options: GenerateOptions | None = None,
    generation: Generation | None = None,
) -> Iterator[TokenEvent]:
    """Check everything at once, then yield the tokens of all prompts as they come. Prompts are texts or token ids.

    Where adapters are inputs, all prompts use those of `generation` to their end, by default the newest at this call.

    Rows of a batch advance together. Batches hold prompts of one graph and come in the order of their first ones: with
    a batch size of 1, prompt after prompt. Where a graph has more prompts than a batch takes, or with a K/V budget, a
    prompt takes the place of the first that ends (`runtime.scheduler`).
    """
    _, events = prepare(model, prompts, options, generation)
    return events


def complete(
    model: Model,
    prompts: Sequence[Prompt | Routed],
    options: GenerateOptions | None = None,
    generation: Generation | None = None,
) -> list[Completion]:
    """Generate to the end: one completion a prompt, in the order of the prompts."""
    requests, events = prepare(model, prompts, options, generation)
    for _ in events:
        pass
    return [request.completion() for request in requests]


def prepare(
    model: Model,
    prompts: Sequence[Prompt | Routed],
    options: GenerateOptions | None = None,
    generation: Generation | None = None,
) -> tuple[list[Request], Iterator[TokenEvent]]:
    """What `generate` yields, and the requests that have their completions once it has ended."""
    options = require_options(options, GenerateOptions)
    if isinstance(prompts, str | bytes | Mapping | Set) or not isinstance(prompts, Iterable):
        got = "one string" if isinstance(prompts, str) else type(prompts).__name__
        raise InputError("prompts", got=got, need="a list of prompts")
    prompts = list(prompts)
    if generation is None and model.adapters is not None:
        generation = model.adapters.current  # what all these prompts will see to their end
    elif generation is not None and not (model.adapters and model.adapters.has(generation)):
        raise InputError("this generation of adapters is another model's", fix="give one of this model's adapters")
    requests, ways = requests_of(model, prompts, options, generation)
    decode, stack = decode_of(options), generation.stack if generation else None
    foldings = _foldings(model, ways, decode)
    runs: list[Iterator[TokenEvent]] = []
    for numbers in _batches(ways, options, decode):
        batch = _Batch(numbers, [requests[n] for n in numbers], [ways[n] for n in numbers], decode, stack, foldings)
        is_continuous = _is_continuous(batch.session, len(numbers), options, decode)
        runs.append(
            _run_continuously(model, batch, options)
            if is_continuous
            else _run(model, batch, measures=options.measure_frozen)
        )
    return requests, chain.from_iterable(runs)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts that run together, in one session."""

    numbers: list[int]  # of the prompts
    requests: list[Request]
    ways: list[Way]
    decode: Decode
    adapters: Stack | None
    foldings: Mapping[str, Folding]  # by graph, where mixes are folded
    steps: StepCount = field(default_factory=StepCount)

    @property
    def session(self) -> SlotSession:
        """The one of all its ways."""
        return self.ways[0].session

    def open(self, model: Model) -> Passes:
        """Its passes, at their start."""
        routings = [way.route.routing for way in self.ways]
        folding = self.foldings.get(self.ways[0].route.graph)
        open_folded = partial(model.open_folded, folding) if folding else None
        return open_ladder(self.session, routings, self.requests, self.decode, self.adapters, self.steps, open_folded)

    def measure_frozen(self) -> None:
        """Give each request under frozen scalings its distance from exact decoding."""
        for row, (request, way) in enumerate(zip(self.requests, self.ways, strict=True)):
            if not way.is_gated:
                continue
            text = [*request.prompt, *(event.token_id for event in request.events[:-1])]
            frozen = FrozenText(text, frozen_from(request, self.decode), self.decode.freeze)
            try:
                request.divergence = frozen_divergence(
                    self.session, way.route.routing, frozen, stack_for(self.session, self.adapters)
                )
            except NumericError as error:
                raise NumericError(error.tensor, (row,)) from error


def _is_continuous(session: SlotSession, prompts: int, options: GenerateOptions, decode: Decode) -> bool:
    """Whether so many prompts of one graph take each other's places, rather than run batch after batch."""
    if session.signature.cache_style is CacheStyle.NONE or not can_schedule(decode):
        return False
    return options.kv_budget is not None or prompts > options.batch_size > 1


def _foldings(model: Model, ways: Sequence[Way], decode: Decode) -> dict[str, Folding]:
    """By graph, how the mixes of its gated requests are folded, where they are asked to be."""
    if decode.mode is not DecodeMode.FOLDED:
        return {}
    return {graph: model.folding_of(graph) for graph in dict.fromkeys(way.route.graph for way in ways if way.is_gated)}


def _batches(ways: Sequence[Way], options: GenerateOptions, decode: Decode) -> list[list[int]]:
    """The prompts, by number, that run together: those of one graph, as many as asked for and the session takes."""
    together: dict[tuple[str, int | None], list[int]] = {}
    for number, way in enumerate(ways):
        is_folded = decode.mode is DecodeMode.FOLDED and way.is_gated  # a mix of its own in a session of its own
        together.setdefault((way.route.graph, number if is_folded else None), []).append(number)
    batches = []
    for numbers in together.values():
        session = ways[numbers[0]].session
        if _is_continuous(session, len(numbers), options, decode):
            batches.append(numbers)
            continue
        is_cached = session.signature.cache_style is not CacheStyle.NONE
        most = session.limits.rows
        if decode.mode is DecodeMode.PAIRED and is_gated(session, [ways[n].route.routing for n in numbers]):
            most = max(1, min(most, session.limits.decode_rows // 2))  # its steps carry gated rows twice
        size = min(options.batch_size, most) if is_cached else 1
        batches += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return sorted(batches)


def _run_continuously(model: Model, batch: _Batch, options: GenerateOptions) -> Iterator[TokenEvent]:
    """All prompts of a graph through a scheduler; those that can never run are refused before the first event."""
    scheduler = Scheduler(model.turn, SchedulerOptions(options.batch_size, options.kv_budget, decode=batch.decode))
    problems: list[InputError] = []
    for number, request, way in zip(batch.numbers, batch.requests, batch.ways, strict=True):
        found: list[InputError] = []
        with gathering(found):
            scheduler.submit(request, way.route.routing, batch.session, batch.adapters)
        problems += [in_prompt(number, problem) for problem in found]
    raise_all("prompts", problems)
    return run_to_end(scheduler)


def _run(model: Model, batch: _Batch, *, measures: bool) -> Iterator[TokenEvent]:
    """The loop: prefill is its first round, every later one carries a token a row."""
    began = perf_counter()
    rows, session = batch.requests, batch.session
    model.turn.begin(session)
    passes = model.turn.holder = batch.open(model)
    try:
        while not all(request.is_done for request in rows):
            _require_turn(model, passes)
            logits = passes.forward(*_padded([request.pending() for request in rows]))
            for request, row in zip(rows, logits, strict=True):
                if not request.is_done:
                    event = request.accept(row, perf_counter() - began)
                    request.steps = batch.steps.copy()
                    if isinstance(passes, FoldedPasses):
                        request.folded = passes.costs
                    yield event
        if measures and batch.decode.freezes:
            _require_turn(model, passes)
            batch.measure_frozen()
    except NumericError as error:
        raise NumericError(error.tensor, tuple(batch.numbers[row] + 1 for row in error.rows), "prompt") from error
    finally:
        if isinstance(passes, FoldedPasses):
            passes.close()
        if batch.adapters is not None and model.turn.holder is passes:
            session.allocate(0)  # the session was the last to hold an old generation's adapters


def _require_turn(model: Model, passes: Passes) -> None:
    if model.turn.holder is not passes:
        raise InputError("another generation has begun on this model", fix="finish one first, or load the model twice")


def _padded(rows: list[tuple[int, ...]]) -> tuple[Ids, Ids]:
    """Tokens [B, S] padded on the right with 0, and counts [B]."""
    counts = np.array([len(row) for row in rows], np.int64)
    tokens = np.zeros((len(rows), counts.max()), np.int64)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens, counts
