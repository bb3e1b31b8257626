"""Prompts to tokens: every pass continues all rows by the tokens the network has not seen, until each has stopped.

Rows of one batch may be of different variants: each brings its own scalings. Graphs run in sessions of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from time import perf_counter

import numpy as np

from runtime.adapter_folder.problems import gathering
from runtime.adapter_pool import Generation
from runtime.decode import Decode, DecodeMode, StepCount, decode_from_text
from runtime.errors import InputError, NumericError, raise_all
from runtime.fold import Folding
from runtime.folded import FoldedPasses
from runtime.frozen import FrozenText, frozen_divergence
from runtime.ladder import frozen_from, is_gated, open_ladder, stack_for
from runtime.model import Model
from runtime.passes import Ids, Passes
from runtime.request import Completion, Limits, Request, TokenEvent
from runtime.routing import Columns, Mix, Route, route_for
from runtime.sampling import Sampler, Sampling
from runtime.scheduler import Scheduler, SchedulerOptions, can_schedule, run_to_end
from runtime.session import SlotSession, StepLimits
from runtime.signature import CacheStyle
from runtime.stacks import Stack
from runtime.text import TextStream

DEFAULT_NEW_TOKENS = 128

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Routed:
    """A prompt with a variant or a mix of its own, where the options' do not hold."""

    prompt: Prompt
    variant: str | None = None
    mix: Mix | None = None


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to generate; the defaults are greedy decoding under the bundle's gate."""

    max_new_tokens: int | None = None  # None: 128, or as many as the model's positions allow
    sampling: Sampling = field(default_factory=Sampling)
    variant: str | None = None  # a variant of the bundle, by name
    mix: Mix | None = None  # or fixed scalings by expert name, {} for the base model; neither: the graph's gate
    stop: tuple[str, ...] = ()  # texts that end a request; they are left out of its text
    stop_token_ids: tuple[int, ...] = ()  # besides the model's end tokens
    batch_size: int = 16  # prompts that run together; as one ends the next takes its place
    kv_budget: int | None = None  # bytes of K/V; prompts beyond it wait
    decode: str | Decode = DecodeMode.AUTO.value  # one of docs/decoding.md; of rows under the gate
    measure_frozen: bool = False  # how far frozen (or folded) scalings are from exact, once a batch has ended

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(InputError("max_new_tokens", got=str(self.max_new_tokens), need="at least 1"))
        if "" in self.stop:
            problems.append(InputError("a stop string is empty", need="at least one character"))
        if self.batch_size < 1:
            problems.append(InputError("batch_size", got=str(self.batch_size), need="at least 1"))
        if self.variant is not None and self.mix is not None:
            problems.append(InputError("a variant has its own mix", got="a variant and a mix", need="one of them"))
        if self.kv_budget is not None and self.kv_budget < 1:
            problems.append(InputError("kv_budget", got=str(self.kv_budget), need="at least 1"))
        with gathering(problems):
            decode = _decode_of(self)
            if self.kv_budget is not None and not can_schedule(decode):
                problems.append(
                    InputError(f"decode {decode.mode} knows no K/V budget", got="kv_budget", fix="leave it out")
                )
        raise_all("options", problems)


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
    options = options or GenerateOptions()
    if isinstance(prompts, str):
        raise InputError("prompts", got="one string", need="a list of prompts")
    if generation is None and model.adapters is not None:
        generation = model.adapters.current  # what all these prompts will see to their end
    elif generation is not None and not (model.adapters and model.adapters.has(generation)):
        raise InputError("this generation of adapters is another model's", fix="give one of this model's adapters")
    requests, ways = requests_of(model, prompts, options, generation)
    decode, stack = _decode_of(options), generation.stack if generation else None
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
class _Way:
    """How one prompt runs."""

    variant: str | None
    route: Route
    session: SlotSession

    @property
    def is_gated(self) -> bool:
        """Whether there is a second pass to save."""
        return is_gated(self.session, [self.route.routing])


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts that run together, in one session."""

    numbers: list[int]  # of the prompts
    requests: list[Request]
    ways: list[_Way]
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


def requests_of(
    model: Model, prompts: Sequence[Prompt | Routed], options: GenerateOptions, generation: Generation | None
) -> tuple[list[Request], list[_Way]]:
    """Each prompt as a request, on its own way where it has one, else the options'; all that is wrong, together."""
    asked = [each if isinstance(each, Routed) else Routed(each) for each in prompts]
    own = [each.variant is not None or each.mix is not None for each in asked]
    loaded = generation.columns if generation else None
    requests: list[Request] = []
    ways: list[_Way] = []
    default: _Way | None = None
    problems: list[InputError] = []
    if options.stop and model.text is None:
        problems.append(InputError("stop strings need a tokenizer, this bundle has none", fix="use stop token ids"))
    if not all(own):
        try:
            default = _way(model, options.variant, options.mix, loaded)
        except InputError as error:  # of no prompt: it is said once
            problems.append(error)
    for number, (each, has_own) in enumerate(zip(asked, own, strict=True)):
        found: list[InputError] = []
        way = None if has_own else default
        if has_own:
            with gathering(found):
                way = _way(model, each.variant, each.mix, loaded)
        with gathering(found):
            ids = _ids(model, each.prompt)
            if way is not None:  # else its limits are not known
                requests.append(_request(model, number, ids, way, options))
                ways.append(way)
        problems += [_in_prompt(number, problem) for problem in found]
    raise_all("prompts", problems)
    return requests, ways


def _way(model: Model, variant: str | None, mix: Mix | None, loaded: Columns | None) -> _Way:
    route = route_for(model.manifest, model.graph, variant, mix, loaded)
    return _Way(variant, route, model.session_of(route.graph))


def _is_continuous(session: SlotSession, prompts: int, options: GenerateOptions, decode: Decode) -> bool:
    """Whether so many prompts of one graph take each other's places, rather than run batch after batch."""
    if session.signature.cache_style is CacheStyle.NONE or not can_schedule(decode):
        return False
    return options.kv_budget is not None or prompts > options.batch_size > 1


def _foldings(model: Model, ways: Sequence[_Way], decode: Decode) -> dict[str, Folding]:
    """By graph, how the mixes of its gated requests are folded, where they are asked to be."""
    if decode.mode is not DecodeMode.FOLDED:
        return {}
    return {graph: model.folding_of(graph) for graph in dict.fromkeys(way.route.graph for way in ways if way.is_gated)}


def _batches(ways: Sequence[_Way], options: GenerateOptions, decode: Decode) -> list[list[int]]:
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
        problems += [_in_prompt(number, problem) for problem in found]
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


def _decode_of(options: GenerateOptions) -> Decode:
    return options.decode if isinstance(options.decode, Decode) else decode_from_text(options.decode)


def _padded(rows: list[tuple[int, ...]]) -> tuple[Ids, Ids]:
    """Tokens [B, S] padded on the right with 0, and counts [B]."""
    counts = np.array([len(row) for row in rows], np.int64)
    tokens = np.zeros((len(rows), counts.max()), np.int64)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens, counts


def _in_prompt(number: int, error: InputError) -> InputError:
    return InputError(str(error), where=f"prompt {number + 1}", code=error.code)


def _request(model: Model, number: int, ids: Sequence[int], way: _Way, options: GenerateOptions) -> Request:
    limits = Limits(
        _new_tokens(len(ids), way.session.limits, options.max_new_tokens),
        model.end_token_ids | frozenset(options.stop_token_ids),
        options.stop,
    )
    stream = TextStream(model.text) if model.text else None
    return Request(number, ids, limits, Sampler(options.sampling), stream, way.variant)


def _ids(model: Model, prompt: Prompt) -> Sequence[int]:
    """A prompt's token ids, each within the vocabulary."""
    if isinstance(prompt, str):
        if model.text is None:
            raise InputError("this bundle has no tokenizer", got="text", need="token ids", fix="use --prompt-ids")
        prompt = model.text.encode(prompt)
    if not prompt:
        raise InputError("the prompt is empty", need="at least one token")
    strange = [token for token in prompt if not 0 <= token < model.vocab_size]
    if strange:
        raise InputError("unknown token ids", got=str(strange[:8]), need=f"0..{model.vocab_size - 1}")
    return prompt


def _new_tokens(prompt: int, limits: StepLimits, wanted: int | None) -> int:
    """How many tokens may come: the last one is never fed back, so it needs no position."""
    room = limits.positions - prompt + 1
    if room < 1 or (wanted or 0) > room:
        raise InputError(
            "too long for the engine's context" if limits.fix else "too long for the model's positions",
            got=f"{prompt} prompt tokens" + (f" and {wanted} new ones" if wanted else ""),
            need=f"prompt + new tokens <= {limits.positions + 1}",
            fix=limits.fix,
            code="E_POSITIONS",
        )
    return min(room, DEFAULT_NEW_TOKENS) if wanted is None else wanted
