"""The lengths of a session's cache slots: what a step may append, where, and at which positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.rows import Rows
from runtime.signature import ROUTER, SCALINGS, CacheStyle, Signature


class Slots:
    """Bookkeeping that every backend shares; it holds no K/V."""

    def __init__(self, signature: Signature, max_positions: int, fix: str = "") -> None:
        self.is_cached = signature.cache_style is not CacheStyle.NONE
        self.max_positions = max_positions
        self._fix = fix  # what allows more
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self._scalings = signature.input(SCALINGS)
        self._has_router = signature.input(ROUTER) is not None

    def allocate(self, slots: int) -> None:
        """This many slots, all empty."""
        self.lengths = np.zeros(slots, np.int64)

    def resize(self, slots: int) -> None:
        """This many slots; those that stay keep their lengths, new ones are empty."""
        kept = self.lengths[:slots]
        self.lengths = np.zeros(slots, np.int64)
        self.lengths[: len(kept)] = kept

    def require_capacity(self, slots: int, capacity: int) -> None:
        """Refuse a capacity below what a slot that stays holds."""
        held = int(self.lengths[:slots].max(initial=0))
        if capacity < held:
            raise InputError("the slots hold more than that", got=f"capacity {capacity}", need=f"at least {held}")

    def move(self, source: int, target: int) -> int:
        """Give the target the source's length and empty the source; how many entries there are to copy."""
        length = int(self.lengths[source])
        self.lengths[source], self.lengths[target] = 0, length
        return length

    def reset(self) -> None:
        """All slots empty."""
        self.lengths[:] = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget a slot's entries from `length` on."""
        held = int(self.lengths[slot])
        if not 0 <= length <= held:
            raise InputError(f"cannot truncate slot {slot}", got=f"length {length}", need=f"0..{held}")
        self.lengths[slot] = length

    def past(self, rows: Rows) -> NDArray[np.int64]:
        """[B]: entries the rows' slots already hold."""
        return self.lengths[rows.slots]

    def positions(self, rows: Rows) -> NDArray[np.int64]:
        """[B, S]: real tokens continue at the slot's length; padding repeats the last real position."""
        past = self.past(rows)[:, None]
        steps = np.arange(rows.tokens.shape[1])
        last = np.maximum(rows.counts - 1, 0)[:, None]
        position: NDArray[np.int64] = np.minimum(past + np.minimum(steps, last), self.max_positions - 1)
        return position

    def advance(self, rows: Rows) -> None:
        """Count the real tokens of a step that went well."""
        if self.is_cached:
            self.lengths[rows.slots] += rows.counts

    def check(self, rows: Rows) -> None:
        """Refuse rows that do not fit together, their slots, or the positions of the model."""
        batch, width = rows.tokens.shape
        if self.past(rows).shape != (batch,) or rows.slots.step not in (None, 1):
            raise InputError(
                f"{batch} rows do not fit the slots",
                got=str(rows.slots),
                need=f"{batch} of {len(self.lengths)} slots in a row",
            )
        if rows.counts.shape != (batch,) or width == 0 or rows.counts.min() < 0 or rows.counts.max() > width:
            raise InputError(
                "row counts do not fit the tokens", got=f"{rows.counts.tolist()}", need=f"{batch} of 0..{width}"
            )
        if rows.logit_index.ndim != 2 or len(rows.logit_index) != batch:
            raise InputError("logit_index has a wrong shape", got=str(rows.logit_index.shape), need=f"({batch}, K)")
        if rows.logit_index.size and not 0 <= rows.logit_index.min() <= rows.logit_index.max() < width:
            raise InputError(
                "logit_index points outside the step", got=f"{rows.logit_index.tolist()}", need=f"0..{width - 1}"
            )
        self._check_scalings(rows)
        self._check_router(rows)
        longest = int((self.past(rows) + rows.counts).max())
        if longest > self.max_positions:
            raise InputError(
                "a row grows past the engine's context" if self._fix else "a row grows past the model's positions",
                got=str(longest),
                need=f"at most {self.max_positions}",
                fix=self._fix,
                code="E_POSITIONS",
            )

    def _check_scalings(self, rows: Rows) -> None:
        need = rows.tokens.shape + tuple(self._scalings.shape[2:]) if self._scalings else None
        got = None if rows.scalings is None else rows.scalings.shape
        if got != need:
            raise InputError("scalings have a wrong shape for this graph", got=str(got), need=str(need))

    def _check_router(self, rows: Rows) -> None:
        switches = rows.router
        if switches is None and not self._has_router:
            return
        is_right = switches is not None and switches.shape == rows.tokens.shape[:1] and np.isin(switches, (0, 1)).all()
        if not is_right or not self._has_router:
            raise InputError(
                "router switches do not fit this graph",
                got="None" if switches is None else f"{switches.tolist()}"[:80],
                need=f"{len(rows.tokens)} of 0 and 1" if self._has_router else "None: it has no router",
            )
