"""Which passes of the network make the next logits: two for rows under the gate, one for all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.decode import StepCount
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


class Layout:
    """The order of a batch's rows in its session, gated ones first, and the cache slots they take.

    Of B rows G are gated: slots 0..G-1 are of their scaling pass, G..2G-1 of their main pass, 2G..G+B-1 of the other
    rows, so that either pass, and both together, continue slots in a row.
    """

    def __init__(self, session: Session, routings: Sequence[Routing]) -> None:
        self.batch, self.gated = len(routings), sum(routing.is_gated for routing in routings)
        self.order = np.argsort([not routing.is_gated for routing in routings], kind="stable")
        self.back = np.argsort(self.order)
        self.slots = self.gated + self.batch
        self.scaling_slots, self.main_slots = slice(0, self.gated), slice(self.gated, self.slots)
        ordered = [routings[place] for place in self.order]
        self._rows = None if ordered[0].row is None else np.stack([_row(routing) for routing in ordered])[:, None]
        has_router = session.signature.input(ROUTER) is not None
        self.router = np.array([routing.is_routed for routing in ordered], np.float32) if has_router else None
        self._per_length = any(routing.per_length for routing in ordered)

    def constants(self, width: int) -> Floats | None:
        """[B, S, G, E]: what rows have without a gate, and gated rows in their scaling pass."""
        if self._rows is None:
            return None
        rows = self._rows / np.float32(width) if self._per_length else self._rows  # [B, 1, G, E]
        return np.broadcast_to(rows, (self.batch, width, *rows.shape[2:]))

    def scaling_pass(self, tokens: Ids, counts: Ids, index: Ids) -> Rows:
        """The gated rows [G, S] in their scaling pass."""
        scalings = self.constants(tokens.shape[1])
        assert scalings is not None
        head = slice(0, self.gated)
        router = None if self.router is None else self.router[head]
        return Rows(tokens, counts, self.scaling_slots, scalings[head], index, router)

    def main_pass(self, tokens: Ids, counts: Ids, gates: Floats | None) -> Rows:
        """All rows [B, S], the gated ones under `gates` [G, S, G, E]; None: nothing of them runs."""
        scalings = self.constants(tokens.shape[1])
        if gates is not None and scalings is not None:
            scalings = np.concatenate([gates, scalings[self.gated :]])
        return Rows(tokens, counts, self.main_slots, scalings, last_index(counts), self.router)

    @contextmanager
    def numbered(self) -> Iterator[None]:
        """Raise a NumericError of what runs inside with the rows as the caller numbers them."""
        try:
            yield
        except NumericError as error:
            bad = tuple(sorted(int(self.order[row]) for row in error.rows))
            raise NumericError(error.tensor, bad) from error


class ExactPasses:
    """A scaling pass computes the gate of the gated rows; the main pass runs all rows, under the gate or constants.

    Every cache is append-only.
    """

    def __init__(
        self,
        session: Session,
        routings: Sequence[Routing],
        adapters: Stack | None = None,
        steps: StepCount | None = None,
    ) -> None:
        self._session, self._layout = session, Layout(session, routings)
        self._steps = steps or StepCount()
        session.allocate(self._layout.slots, adapters)

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """One or two steps of the same network. Raises NumericError with the rows as the caller numbers them."""
        layout = self._layout
        tokens, counts = tokens[layout.order], counts[layout.order]
        with layout.numbered():
            gates = self._gates(tokens[: layout.gated], counts[: layout.gated])
            logits = last_logits(self._session, layout.main_pass(tokens, counts, gates))
        taken = 1 + (gates is not None)
        self._steps.taken += taken
        self._steps.exact += taken
        return logits[layout.back]

    def _gates(self, tokens: Ids, counts: Ids) -> Floats | None:
        """[G, S, G, E] of the gated rows."""
        if not counts.any():
            return None
        return self._session.step(self._layout.scaling_pass(tokens, counts, nowhere(len(tokens)))).gate


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


def nowhere(rows: int) -> Ids:
    """[B, 0]: the index of a step that needs no logits."""
    return np.empty((rows, 0), np.int64)


def last_index(counts: Ids) -> Ids:
    """[B, 1]: the position of each row's last real token; 0 for a row without any."""
    return np.maximum(counts - 1, 0)[:, None]


def last_logits(session: Session, rows: Rows) -> Floats:
    """Run one step and give its logits [B, V]."""
    return session.step(rows).logits[:, 0]
