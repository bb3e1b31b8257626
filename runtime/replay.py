"""Replay of a graph for checking: what it gives in prefill and cached decode, of its own text or of a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.passes import constant
from runtime.rows import Rows
from runtime.session import Session
from runtime.signature import ROUTER, CacheStyle
from runtime.stacks import Stack

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

PROBES = 8  # positions of a given prompt whose logits are compared


@dataclass(frozen=True, slots=True)
class Replay:
    """One prompt and its greedy continuation. T = len(tokens) - 1: the last token is never fed."""

    prompt: int  # tokens[:prompt] is the prompt
    tokens: tuple[int, ...]
    logits: Floats  # [T, V]
    gate: Floats | None  # [T, G, E]


def replay(
    session: Session,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    row: Floats | None,
    *,
    is_gated: bool,
    per_length: bool = False,
    is_routed: bool = False,
    adapters: Stack | None = None,
) -> list[Replay]:
    """Prefill all prompts as one ragged batch, then decode greedily through the caches.

    `row` [G, E] holds the constant scalings (of the scaling pass when `is_gated`), divided by the sequence length when
    `per_length`; None for a static graph. `is_routed`: under the router inside the sites. `adapters` feed a graph
    whose adapters are inputs.
    """
    batch = len(prompts)
    session.allocate(2 * batch if is_gated else batch, adapters)
    tokens = [list(prompt) for prompt in prompts]
    fed = [0] * batch
    logits: list[list[Floats]] = [[] for _ in prompts]
    gates: list[list[Floats]] = [[] for _ in prompts]
    for _ in range(new_tokens):
        start = [0] * batch if session.signature.cache_style is CacheStyle.NONE else fed
        new = [t[s:] for t, s in zip(tokens, start, strict=True)]
        scaled = row / np.float32(len(new[0])) if per_length and row is not None else row
        everywhere = np.tile(np.arange(max(map(len, new))), (batch, 1))
        [step_logits], step_gate = _step(session, new, scaled, is_gated, [everywhere], is_routed=is_routed)
        for b in range(batch):
            count = len(tokens[b]) - start[b]
            if start[b] == 0:
                logits[b], gates[b] = [], []
            logits[b].append(step_logits[b, :count])
            if step_gate is not None:
                gates[b].append(step_gate[b, :count])
            fed[b] = len(tokens[b])
            tokens[b].append(int(step_logits[b, count - 1].argmax()))
    return [
        Replay(len(prompt), tuple(tokens[b]), np.concatenate(logits[b]), np.concatenate(gates[b]) if gates[b] else None)
        for b, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True, slots=True)
class GivenText:
    """A prompt and a continuation that are fed as they are, whatever the session would have chosen."""

    prompt: int  # tokens[:prompt] is the prompt
    tokens: tuple[int, ...]

    @property
    def positions(self) -> NDArray[np.int64]:
        """Where logits are asked for: PROBES places spread over the prompt, its last among them, and every decode step.

        A prompt shorter than that has some of them twice: the rows of a batch ask for equally many.
        """
        probes = np.linspace(0, self.prompt - 1, PROBES).round().astype(np.int64)
        return np.concatenate([probes, np.arange(self.prompt, len(self.tokens))])


@dataclass(frozen=True, slots=True)
class Answer:
    """What was computed for a given text."""

    logits: Floats  # [P, V] at its positions
    gate: Floats | None  # [T, G, E] at every token


def replay_given(
    session: Session,
    texts: Sequence[GivenText],
    row: Floats | None,
    *,
    is_gated: bool,
    is_routed: bool = False,
    adapters: Stack | None = None,
) -> list[Answer]:
    """Prefill the prompts as one ragged batch, then feed the continuations, equally long, token by token.

    No step asks for more than one position's logits, since engines are built for no more: the prefill of the
    main pass is run once for each probe.
    """
    if session.signature.cache_style is CacheStyle.NONE:
        return [
            _answer_whole(session, text, row, is_gated=is_gated, is_routed=is_routed, adapters=adapters)
            for text in texts
        ]
    batch = len(texts)
    session.allocate(2 * batch if is_gated else batch, adapters)
    probes = np.stack([text.positions[:PROBES] for text in texts])  # [B, PROBES]
    prompts = [list(text.tokens[: text.prompt]) for text in texts]
    asked = [probes[:, k : k + 1] for k in range(PROBES)]
    first, gate = _step(session, prompts, row, is_gated, asked, is_routed=is_routed)
    logits, gates = [step[:, 0] for step in first], [gate]
    last = np.zeros((batch, 1), np.int64)
    for i in range(len(texts[0].tokens) - texts[0].prompt):
        new = [[text.tokens[text.prompt + i]] for text in texts]
        [step], gate = _step(session, new, row, is_gated, [last], is_routed=is_routed)
        logits.append(step[:, 0])
        gates.append(gate)
    return [
        Answer(np.stack([step[b] for step in logits]), _gate_of(gates, b, text.prompt)) for b, text in enumerate(texts)
    ]


def _gate_of(gates: Sequence[Floats | None], row: int, prompt: int) -> Floats | None:
    """One row's gate without the padding of its prefill [T, G, E]."""
    kept = [gate[row, : prompt if step == 0 else 1] for step, gate in enumerate(gates) if gate is not None]
    return np.concatenate(kept) if kept else None


def _answer_whole(
    session: Session, text: GivenText, row: Floats | None, *, is_gated: bool, is_routed: bool, adapters: Stack | None
) -> Answer:
    """A graph without caches: each position is the last of a sequence that is computed whole."""
    session.allocate(2 if is_gated else 1, adapters)
    steps = [
        _step(session, [list(text.tokens[: end + 1])], row, is_gated, [np.array([[end]])], is_routed=is_routed)
        for end in (*text.positions.tolist(), len(text.tokens) - 1)
    ]
    gate = steps[-1][1]
    return Answer(np.stack([logits[0][0, 0] for logits, _ in steps[:-1]]), None if gate is None else gate[0])


def _step(
    session: Session,
    new: list[list[int]],
    row: Floats | None,
    is_gated: bool,
    asked: Sequence[Ids],
    *,
    is_routed: bool,
) -> tuple[list[Floats], Floats | None]:
    """Logits [B, K, V] at each of `asked` [B, K] and gate [B, S, G, E] for the new tokens of every row.

    Two passes or one; the last is run once for each of `asked`, and its tokens are kept once.
    """
    batch, longest = len(new), max(map(len, new))
    counts = np.array([len(ids) for ids in new], np.int64)
    tokens = np.zeros((batch, longest), np.int64)
    for b, ids in enumerate(new):
        tokens[b, : len(ids)] = ids
    scalings, gate = (None if row is None else constant(row, tokens)), None
    has_router = session.signature.input(ROUTER) is not None
    router = np.full(batch, is_routed, np.float32) if has_router else None
    if is_gated:
        nowhere = np.empty((batch, 0), np.int64)
        gate = session.step(Rows(tokens, counts, slice(0, batch), scalings, nowhere, router)).gate
        scalings = gate
    slots = slice(batch, 2 * batch) if is_gated else slice(0, batch)
    before = session.lengths[slots].tolist()
    logits = []
    for k, index in enumerate(asked):
        for slot, length in enumerate(before if k else (), slots.start):
            session.truncate(slot, length)
        logits.append(session.step(Rows(tokens, counts, slots, scalings, index, router)).logits)
    return logits, gate
