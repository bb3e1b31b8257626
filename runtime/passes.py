"""Which passes of the network make the next logits: two with a gate, one with fixed scalings or none."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.rows import Rows
from runtime.session import Session

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

CHUNK = 512  # tokens a row in one step


class Passes(Protocol):
    """A batch in decoding; each call continues every row by its new tokens."""

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """Tokens [B, S], right-padded after counts [B] real ones -> logits [B, V] after each row's last real token."""


class OnePass:
    """Constant scalings [G, E] (a mix, one expert, the base), or None for a static graph."""

    def __init__(self, session: Session, batch: int, scalings: Floats | None) -> None:
        self._session, self._scalings = session, scalings
        self._slots = slice(0, batch)
        session.allocate(batch)

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """One pass."""
        scalings = None if self._scalings is None else constant(self._scalings, tokens)
        return last_logits(self._session, Rows(tokens, counts, self._slots, scalings, last_index(counts)))


class ExactPasses:
    """X-LoRA: the scaling pass under a constant row [G, E] computes the gate, the main pass runs under it.

    Two append-only caches per row: slots 0..B-1 for the scaling pass, B..2B-1 for the main pass.
    `per_length` divides the constant row by the sequence length, which is known only when whole sequences are computed.
    """

    def __init__(self, session: Session, batch: int, scaling_pass: Floats, *, per_length: bool = False) -> None:
        self._session, self._constant, self._per_length = session, scaling_pass, per_length
        self._scaling_slots, self._main_slots = slice(0, batch), slice(batch, 2 * batch)
        session.allocate(2 * batch)

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """Two passes of the same network."""
        row = self._constant / np.float32(tokens.shape[1]) if self._per_length else self._constant
        nowhere = np.empty((len(tokens), 0), np.int64)  # the scaling pass needs no logits
        rows = Rows(tokens, counts, self._scaling_slots, constant(row, tokens), nowhere)
        gate = self._session.step(rows).gate
        return last_logits(self._session, Rows(tokens, counts, self._main_slots, gate, last_index(counts)))


class InChunks:
    """Long prompts a chunk at a time: attention scores [H, S, C + S] would otherwise outgrow memory."""

    def __init__(self, passes: Passes, size: int = CHUNK) -> None:
        self._passes, self._size = passes, size

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """The same logits as in one go; rows that end in an earlier chunk ride along with count 0."""
        logits = self._passes.forward(tokens[:, : self._size], np.minimum(counts, self._size))
        for start in range(self._size, tokens.shape[1], self._size):
            part = np.clip(counts - start, 0, self._size)
            new = self._passes.forward(tokens[:, start : start + self._size], part)
            logits = np.where((part > 0)[:, None], new, logits)
        return logits


class WholeSequence:
    """Passes over a graph without caches: every call computes the sequence from its start. One row, never padded."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._tokens: Ids = np.empty((1, 0), np.int64)

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """All tokens so far."""
        self._tokens = np.concatenate([self._tokens, tokens], axis=1)
        return self._passes.forward(self._tokens, np.array([self._tokens.shape[1]]))


def constant(row: Floats, tokens: Ids) -> Floats:
    """The same scalings [G, E] for all tokens: a [B, S, G, E] view."""
    return np.broadcast_to(row, tokens.shape + row.shape)


def last_index(counts: Ids) -> Ids:
    """[B, 1]: the position of each row's last real token; 0 for a row without any."""
    return np.maximum(counts - 1, 0)[:, None]


def last_logits(session: Session, rows: Rows) -> Floats:
    """Run one step and give its logits [B, V]."""
    return session.step(rows).logits[:, 0]
