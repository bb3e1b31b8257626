"""Scalings that stay, folded into the weights of a session without experts: one request, one session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Protocol, cast

from runtime.decode import FoldCosts
from runtime.frozen import FrozenPasses
from runtime.passes import Floats, Ids, Passes, last_index, last_logits
from runtime.rows import Rows
from runtime.session import Session
from runtime.tensors import Array

TIMED = 3  # tokens under frozen scalings before they are folded: what a step takes; the first binds memory


class Movable(Session, Protocol):
    """A session whose K/V can be taken to another."""

    def entries(self, slot: int) -> Mapping[str, Array]:
        """What a slot holds."""

    def restore(self, slot: int, entries: Mapping[str, Array]) -> None:
        """Fill a slot."""


class FoldedPasses:
    """One gated row like `FrozenPasses`; then, its K/V moved over, in the session that `open_folded` gives.

    Mixes differ from request to request, so nothing is shared: a batch is one row. K/V stay what they are, made under
    the gate's scalings where there were some, so the tokens are those of `FrozenPasses`.
    """

    MAIN_SLOT = 1  # of one gated row's two

    def __init__(
        self,
        session: Session,
        frozen: FrozenPasses,
        passes: Passes,
        open_folded: Callable[[Floats], Session],
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """`passes`: `frozen`, in chunks. `open_folded`: scalings [G, E] -> a session of the graph without experts."""
        self._session, self._frozen, self._passes = cast(Movable, session), frozen, passes
        self._open, self._clock = open_folded, clock
        self._folded: Movable | None = None
        self._folding_seconds = 0.0
        self._frozen_steps: list[float] = []
        self._folded_steps: list[float] = []

    def forward(self, tokens: Ids, counts: Ids) -> Floats:
        """One or two steps. After an error the slots are as before."""
        if self._folded is None and len(self._frozen_steps) == TIMED:
            self._folded = self._fold()
        stays, began = self._frozen.is_frozen, self._clock()
        if self._folded is not None:
            logits = last_logits(self._folded, Rows(tokens, counts, slice(0, 1), None, last_index(counts)))
            self._folded_steps.append(self._clock() - began)
            self._frozen.count_steps(1, counts)
            return logits
        logits = self._passes.forward(tokens, counts)
        if stays:
            self._frozen_steps.append(self._clock() - began)
        return logits

    @property
    def costs(self) -> FoldCosts | None:
        """What it took; None: the request ended before."""
        if self._folded is None:
            return None
        return FoldCosts(self._folding_seconds, _typical(self._frozen_steps), _typical(self._folded_steps))

    def close(self) -> None:
        """Free the session of the mix; no token comes after that."""
        if self._folded is not None:
            self._folded.close()

    def _fold(self) -> Movable:
        began = self._clock()
        [scalings] = self._frozen.kept
        folded = cast(Movable, self._open(scalings))
        folded.allocate(1)
        folded.restore(0, self._session.entries(self.MAIN_SLOT))
        self._folding_seconds = self._clock() - began
        return folded


def _typical(steps: list[float]) -> float | None:
    """Their median but for the first, which binds memory."""
    return median(steps[1:]) if len(steps) > 1 else None
