"""Some slots of a session as a session of their own, in an order of their own: so that rows may come and go.

What decodes a batch (`runtime.passes`, `runtime.paired`) numbers its slots from 0 in an order it chooses. A view puts
each step's rows where their slots lie. Slots in between that are not of the step ride along with count 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, NumericError
from runtime.rows import Rows, StepResult
from runtime.session import Session
from runtime.stacks import Stack

Number = TypeVar("Number", bound=np.generic)


class SlotView:
    """Slot n of the view is slot `slots[n]` of the session; memory and adapters stay the session's own."""

    def __init__(self, session: Session, slots: Sequence[int]) -> None:
        self.slots = tuple(slots)
        self._session, self._places = session, np.array(slots, np.int64)
        self.signature, self.provider = session.signature, session.provider
        riders = int(np.ptp(self._places)) + 1 - len(slots) if len(slots) else 0
        limits = session.limits
        self.limits = replace(limits, rows=limits.rows - riders, decode_rows=limits.decode_rows - riders)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[slots]: entries held per slot. A copy."""
        return self._session.lengths[self._places]

    def allocate(self, slots: int, adapters: Stack | None = None) -> None:
        """Nothing: the slots are there, with what they hold and with the session's adapters."""
        if slots != len(self._places):
            raise InputError("a view has the slots it was made with", got=str(slots), need=str(len(self._places)))

    def step(self, rows: Rows) -> StepResult:
        """Run the rows in the order of their slots; results and errors are in the order of the rows."""
        places = self._places[rows.slots]
        first, count = int(places.min()), int(np.ptp(places)) + 1
        order = places - first  # [B]: where each row goes
        if len(places) == count and (order == np.arange(count)).all():
            return self._session.step(replace(rows, slots=slice(first, first + count)))
        spread = Rows(
            _spread(rows.tokens, order, count),
            _spread(rows.counts, order, count),
            slice(first, first + count),
            None if rows.scalings is None else _spread(rows.scalings, order, count),
            _spread(rows.logit_index, order, count),
            None if rows.router is None else _spread(rows.router, order, count),
        )
        try:
            result = self._session.step(spread)
        except NumericError as error:
            bad = tuple(sorted(int(np.flatnonzero(order == row)[0]) for row in error.rows))
            raise NumericError(error.tensor, bad) from error
        return StepResult(result.logits[order], None if result.gate is None else result.gate[order])

    def truncate(self, slot: int, length: int) -> None:
        """Drop a slot's last entries down to `length`."""
        self._session.truncate(int(self._places[slot]), length)

    def reset(self) -> None:
        """Empty the slots of the view."""
        for slot in range(len(self._places)):
            self.truncate(slot, 0)

    def close(self) -> None:
        """Nothing: the session is not the view's."""


def _spread(rows: NDArray[Number], order: NDArray[np.int64], count: int) -> NDArray[Number]:
    """[count, ...]: row b at place order[b], zeros between."""
    wide = np.zeros((count, *rows.shape[1:]), rows.dtype)
    wide[order] = rows
    return wide
