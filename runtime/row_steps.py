"""The steps of requests in a pool's slots: a chunk of prompts, or a token each. Rows may differ from call to call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.decode import StepCount
from runtime.pace import Pace
from runtime.paired import PairedPasses
from runtime.passes import ExactPasses, Floats, Ids, Passes
from runtime.session import SlotSession
from runtime.signature import CacheStyle
from runtime.slot_pool import SlotPool, needed_entries
from runtime.slot_view import SlotView
from runtime.tickets import Ticket


class RowSteps:
    """All rows are of one session. After an error both slots of a request end at one token, so a call may be repeated.

    `count`: of all steps so far, and of those that `exact` would have taken. `pairs`: whether decode steps carry
    drafts, at the pace that says so, or always without one.
    """

    def __init__(self, session: SlotSession, pool: SlotPool[Ticket], *, pairs: bool, pace: Pace | None) -> None:
        self._session, self._pool = session, pool
        self._pairs, self._pace = pairs, pace
        self.count = StepCount()
        self._decoder: tuple[object, Passes] | None = None  # of which rows at which slots, and what decodes them

    def prefill(self, rows: Sequence[Ticket], tokens: Ids, counts: Ids) -> Floats:
        """Logits [B, V] after the tokens [B, S] of these prompts, right-padded after counts [B]."""
        passes = ExactPasses(self._view(rows), [row.routing for row in rows], steps=self.count)
        return self._run(rows, passes, tokens, counts)

    def decode(self, rows: Sequence[Ticket]) -> Floats:
        """Logits [B, V] after each row's newest token."""
        tokens = np.array([row.request.pending() for row in rows], np.int64)
        return self._run(rows, self._passes(rows), tokens, np.ones(len(rows), np.int64))

    def fit_together(self, rows: Sequence[Ticket], budget: int) -> bool:
        """Whether the rest of these prompts may be one step of at most `budget` tokens, padding included.

        Their slots must lie in a row: what rode along between would be padded to the whole width.
        """
        limits, width = self._session.limits, max(row.left for row in rows)
        if len(rows) > limits.rows or width > limits.tokens or len(rows) * width > budget:
            return False
        if self._session.signature.cache_style is CacheStyle.ALIAS and any(  # the graph writes the padding too
            row.fed + width > needed_entries(self._session, row.claim) for row in rows
        ):
            return False
        mains = [self._pool.main(row) for row in rows]
        scalings = [self._pool.scaling(row) for row in rows if row.claim.is_gated]
        return all(max(slots) - min(slots) < len(slots) for slots in (mains, scalings) if slots)

    def _run(self, rows: Sequence[Ticket], passes: Passes, tokens: Ids, counts: Ids) -> Floats:
        try:
            return passes.forward(tokens, counts)
        except BaseException:
            self._align(rows)
            self._decoder = None
            raise

    def _passes(self, rows: Sequence[Ticket]) -> Passes:
        """What decodes these rows: kept, with what it has drafted, for as long as they and their slots stay."""
        view = self._view(rows)
        key = (tuple(rows), view.slots)
        if self._decoder is None or self._decoder[0] != key:
            self._align(rows)
            self._decoder = key, self._decoder_of(rows, view)
        return self._decoder[1]

    def _decoder_of(self, rows: Sequence[Ticket], view: SlotView) -> Passes:
        routings = [row.routing for row in rows]
        if self._pairs and any(row.claim.is_gated for row in rows):
            return PairedPasses(view, routings, rows, self._pace, steps=self.count)
        return ExactPasses(view, routings, steps=self.count)

    def _view(self, rows: Sequence[Ticket]) -> SlotView:
        """The slots of these rows in the order of `runtime.passes.Layout`."""
        gated = [row for row in rows if row.claim.is_gated]
        others = [row for row in rows if not row.claim.is_gated]
        mains = [self._pool.main(row) for row in (*gated, *others)]
        return SlotView(self._session, [*(self._pool.scaling(row) for row in gated), *mains])

    def _align(self, rows: Sequence[Ticket]) -> None:
        """Drop what scaling slots hold beyond the main ones: drafts, and the first half of a call that failed."""
        lengths = self._session.lengths
        for row in rows:
            if row.claim.is_gated:
                self._session.truncate(self._pool.scaling(row), int(lengths[self._pool.main(row)]))
