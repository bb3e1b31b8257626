"""Replay of a graph for checking: logits and gate at every position of prefill and cached greedy decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.passes import constant
from runtime.rows import Rows
from runtime.session import Session
from runtime.signature import CacheStyle

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


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
) -> list[Replay]:
    """Prefill all prompts as one ragged batch, then decode greedily through the caches.

    `row` [G, E] holds the constant scalings (of the scaling pass when `is_gated`), divided by the sequence length when
    `per_length`; None for a static graph.
    """
    batch = len(prompts)
    session.allocate(2 * batch if is_gated else batch)
    tokens = [list(prompt) for prompt in prompts]
    fed = [0] * batch
    logits: list[list[Floats]] = [[] for _ in prompts]
    gates: list[list[Floats]] = [[] for _ in prompts]
    for _ in range(new_tokens):
        start = [0] * batch if session.signature.cache_style is CacheStyle.NONE else fed
        new = [t[s:] for t, s in zip(tokens, start, strict=True)]
        scaled = row / np.float32(len(new[0])) if per_length and row is not None else row
        step_logits, step_gate = _step(session, new, scaled, is_gated)
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


def _step(session: Session, new: list[list[int]], row: Floats | None, is_gated: bool) -> tuple[Floats, Floats | None]:
    """Logits [B, S, V] and gate [B, S, G, E] for the new tokens of every row, in two passes or one."""
    batch, longest = len(new), max(map(len, new))
    counts = np.array([len(ids) for ids in new], np.int64)
    tokens = np.zeros((batch, longest), np.int64)
    for b, ids in enumerate(new):
        tokens[b, : len(ids)] = ids
    everywhere = np.broadcast_to(np.arange(longest), (batch, longest)).copy()
    scalings, gate = (None if row is None else constant(row, tokens)), None
    if is_gated:
        nowhere = np.empty((batch, 0), np.int64)
        gate = session.step(Rows(tokens, counts, slice(0, batch), scalings, nowhere)).gate
        scalings = gate
    slots = slice(batch, 2 * batch) if is_gated else slice(0, batch)
    return session.step(Rows(tokens, counts, slots, scalings, everywhere)).logits, gate
