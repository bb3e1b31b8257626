"""Prompts to tokens: every pass continues all rows by the tokens the network has not seen, until each has stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from runtime.errors import InputError, raise_all
from runtime.model import Model
from runtime.passes import Ids
from runtime.request import Completion, Limits, Request, TokenEvent
from runtime.routing import Routing, routing_for
from runtime.sampling import Sampler, Sampling
from runtime.session import StepLimits
from runtime.signature import CacheStyle
from runtime.text import TextStream

DEFAULT_NEW_TOKENS = 128

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to generate; the defaults are greedy decoding under the bundle's gate."""

    max_new_tokens: int | None = None  # None: 128, or as many as the model's positions allow
    sampling: Sampling = field(default_factory=Sampling)
    mix: Mapping[str, float] | None = None  # fixed scalings by expert name, {} for the base model; None: the gate
    stop: tuple[str, ...] = ()  # texts that end a request; they are left out of its text
    stop_token_ids: tuple[int, ...] = ()  # besides the model's end tokens
    batch_size: int = 16  # prompts that run together

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(InputError("max_new_tokens", got=str(self.max_new_tokens), need="at least 1"))
        if "" in self.stop:
            problems.append(InputError("a stop string is empty", need="at least one character"))
        if self.batch_size < 1:
            problems.append(InputError("batch_size", got=str(self.batch_size), need="at least 1"))
        raise_all("options", problems)


def generate(model: Model, prompts: Sequence[Prompt], options: GenerateOptions | None = None) -> Iterator[TokenEvent]:
    """Check everything at once, then yield the tokens of all prompts as they come. Prompts are texts or token ids."""
    _, events = _prepare(model, prompts, options or GenerateOptions())
    return events


def complete(model: Model, prompts: Sequence[Prompt], options: GenerateOptions | None = None) -> list[Completion]:
    """Generate to the end: one completion a prompt."""
    requests, events = _prepare(model, prompts, options or GenerateOptions())
    for _ in events:
        pass
    return [request.completion() for request in requests]


def _prepare(
    model: Model, prompts: Sequence[Prompt], options: GenerateOptions
) -> tuple[list[Request], Iterator[TokenEvent]]:
    routing = routing_for(model.manifest, model.graph, options.mix)
    requests = _requests(model, prompts, options)
    is_cached = model.session.signature.cache_style is not CacheStyle.NONE
    size = min(options.batch_size, model.session.limits.rows) if is_cached else 1
    return requests, _run_in_batches(model, requests, routing, size)


def _run_in_batches(model: Model, requests: list[Request], routing: Routing, size: int) -> Iterator[TokenEvent]:
    for start in range(0, len(requests), size):
        yield from _run(model, requests[start : start + size], routing)


def _run(model: Model, requests: list[Request], routing: Routing) -> Iterator[TokenEvent]:
    """The loop: prefill is its first round, every later one carries a token a row."""
    began = perf_counter()
    passes = model.turn.holder = routing.open(model.session, len(requests))
    while not all(request.is_done for request in requests):
        if model.turn.holder is not passes:
            raise InputError(
                "another generation has begun on this model", fix="finish one first, or load the model twice"
            )
        logits = passes.forward(*_padded([request.pending() for request in requests]))
        for request, row in zip(requests, logits, strict=True):
            if not request.is_done:
                yield request.accept(row, perf_counter() - began)


def _padded(rows: list[tuple[int, ...]]) -> tuple[Ids, Ids]:
    """Tokens [B, S] padded on the right with 0, and counts [B]."""
    counts = np.array([len(row) for row in rows], np.int64)
    tokens = np.zeros((len(rows), counts.max()), np.int64)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens, counts


def _requests(model: Model, prompts: Sequence[Prompt], options: GenerateOptions) -> list[Request]:
    """All prompts as requests; what is wrong with any of them, reported together."""
    if isinstance(prompts, str):
        raise InputError("prompts", got="one string", need="a list of prompts")
    if options.stop and model.text is None:
        raise InputError("stop strings need a tokenizer, this bundle has none", fix="use stop token ids")
    requests, problems = [], []
    for number, prompt in enumerate(prompts):
        try:
            requests.append(_request(model, number, prompt, options))
        except InputError as error:
            problems.append(InputError(str(error), where=f"prompt {number + 1}", code=error.code))
    raise_all("prompts", problems)
    return requests


def _request(model: Model, number: int, prompt: Prompt, options: GenerateOptions) -> Request:
    ids = _ids(model, prompt)
    limits = Limits(
        _new_tokens(len(ids), model.session.limits, options.max_new_tokens),
        model.end_token_ids | frozenset(options.stop_token_ids),
        options.stop,
    )
    stream = TextStream(model.text) if model.text else None
    return Request(number, ids, limits, Sampler(options.sampling), stream)


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
