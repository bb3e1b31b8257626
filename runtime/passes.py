"""Which passes of the network make the next logits: two for rows under the gate, one for all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import NumericError
from runtime.rows import Rows
from runtime.session import Session
from runtime.signature import ROUTER
from runtime.stacks import Stack

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

CHUNK = 512  # tokens a row in one step


class Passes(Protocol):
    """A batch in decoding; each call continues every row by its new tokens."""

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """Tokens [B, S], right-padded after counts [B] real ones -> logits [B, V] after each row's last real token."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Where a row's scalings come from: constant ones [G, E], or the gate, for which these are the scaling pass's."""

    row: Floats | None  # None: the graph takes no scalings
    is_gated: bool = False
    per_length: bool = False  # the gate's constant row is divided by the sequence length
    is_routed: bool = False  # by the router inside the sites; its scalings are then 1


class ExactPasses:
    """A scaling pass computes the gate of the gated rows; the main pass runs all rows, under the gate or constants.

    Every cache is append-only. Of B rows G are gated: slots 0..G-1 are of their scaling pass, G..2G-1 of their main
    pass, 2G..G+B-1 of the other rows, so that either pass continues slots in a row.
    """

    def __init__(self, session: Session, routings: Sequence[Routing], adapters: Stack | None = None) -> None:
        batch, gated = len(routings), sum(routing.is_gated for routing in routings)
        self._session = session
        self._order = np.argsort([not routing.is_gated for routing in routings], kind="stable")  # gated rows first
        self._back = np.argsort(self._order)
        self._gated, self._scaling_slots, self._main_slots = gated, slice(0, gated), slice(gated, gated + batch)
        ordered = [routings[place] for place in self._order]
        self._rows = None if ordered[0].row is None else np.stack([_row(routing) for routing in ordered])[:, None]
        has_router = session.signature.input(ROUTER) is not None
        self._router = np.array([routing.is_routed for routing in ordered], np.float32) if has_router else None
        self._per_length = any(routing.per_length for routing in ordered)
        session.allocate(gated + batch, adapters)

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """One or two steps of the same network. Raises NumericError with the rows as the caller numbers them."""
        tokens, counts = tokens[self._order], counts[self._order]
        try:
            scalings, index = self._scalings(tokens, counts), last_index(counts)
            rows = Rows(tokens, counts, self._main_slots, scalings, index, self._router)
            return last_logits(self._session, rows)[self._back]
        except NumericError as error:
            bad = tuple(sorted(int(self._order[row]) for row in error.rows))
            raise NumericError(error.tensor, bad) from error

    def _scalings(self, tokens: Ids, counts: Ids) -> Floats | None:
        """[B, S, G, E] of the main pass."""
        if self._rows is None:
            return None
        rows = self._rows / np.float32(tokens.shape[1]) if self._per_length else self._rows  # [B, 1, G, E]
        scalings = np.broadcast_to(rows, tokens.shape + rows.shape[2:])
        if not counts[: self._gated].any():
            return scalings
        nowhere = np.empty((self._gated, 0), np.int64)  # the scaling pass needs no logits
        head = slice(0, self._gated)
        router = None if self._router is None else self._router[head]
        scaling_pass = Rows(tokens[head], counts[head], self._scaling_slots, scalings[head], nowhere, router)
        gate = self._session.step(scaling_pass).gate
        assert gate is not None
        return np.concatenate([gate, scalings[self._gated :]])


def _row(routing: Routing) -> Floats:
    assert routing.row is not None, "rows of one graph all have scalings or none has"
    return routing.row


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
