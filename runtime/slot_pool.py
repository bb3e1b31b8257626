"""K/V slots for requests that come and go, within a budget of bytes. All that a request may need is reserved at once.

    scaling slots of the requests under the gate | their main slots | main slots of the others

lie in a row, so that a scaling pass, a main pass and both together each continue slots in a row. All slots have one
capacity: what the longest request needs.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from runtime.caches import GRAIN, capacity_for
from runtime.errors import InputError
from runtime.session import SlotSession
from runtime.signature import CacheStyle
from runtime.slot_plan import plan_places
from runtime.stacks import Stack

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Claim:
    """The slots that a request takes, and the most entries that each will hold."""

    entries: int
    is_gated: bool

    @property
    def slots(self) -> int:
        """A main slot and, under the gate, one of the scaling pass."""
        return 2 if self.is_gated else 1


class SlotPool(Generic[Key]):
    """The slots of one session. The K/V memory never exceeds the budget, not even while it is copied.

    Slots are reserved by `take`, have places after `arrange`, and go with `give`.
    """

    def __init__(
        self, session: SlotSession, most_slots: int, budget: int | None = None, adapters: Stack | None = None
    ) -> None:
        self._session, self._adapters = session, adapters
        self._budget, self._most_slots = budget, most_slots
        self._claims: dict[Key, Claim] = {}
        self._places: dict[tuple[Key, bool], int] = {}  # (request, whether of its scaling pass) -> slot
        self._middle = 0  # the first main slot
        self.slots = self.capacity = 0
        session.allocate(0, adapters)

    @property
    def nbytes(self) -> int:
        """What the K/V memory takes."""
        return self._session.cache_bytes(self.slots, self.capacity)

    def main(self, key: Key) -> int:
        """The slot of a request's main pass."""
        return self._places[key, False]

    def scaling(self, key: Key) -> int:
        """The slot of a gated request's scaling pass."""
        return self._places[key, True]

    def take(self, key: Key, claim: Claim) -> bool:
        """Reserve all that a request may need; False, and nothing changed, where that has to wait for others."""
        claims = [*self._claims.values(), claim]
        slots, entries = sum(each.slots for each in claims), max(needed_entries(self._session, each) for each in claims)
        is_small = slots > self.slots or entries > self.capacity
        is_fresh = not self._claims and self._wastes(entries)
        if (is_small or is_fresh) and not self._reshape(slots, entries):
            return False
        self._claims[key] = claim
        return True

    def give(self, key: Key) -> None:
        """Free a request's slots."""
        del self._claims[key]
        for place in [place for place in self._places if place[0] == key]:
            self._session.truncate(self._places.pop(place), 0)

    def arrange(self) -> None:
        """Give every slot its place, close gaps, and make slots shorter once the longest requests have gone."""
        if self._claims:
            entries = max(needed_entries(self._session, claim) for claim in self._claims.values())
            if self._wastes(entries):
                self._reshape(self.slots, entries)
        self._arrange(self.slots)

    def _arrange(self, slots: int) -> None:
        """All places among the first so many slots."""
        gated = [key for key, claim in self._claims.items() if claim.is_gated]
        others = [key for key, claim in self._claims.items() if not claim.is_gated]
        self._middle = max(len(gated), min(self._middle, slots - len(gated) - len(others)))
        segments = [[(key, True) for key in gated], [(key, False) for key in gated], [(key, False) for key in others]]
        plan = plan_places(self._places, segments, self._middle - len(gated))
        for source, target in plan.moves:
            self._session.move(source, target)
        self._places = dict(plan.places)

    def _reshape(self, slots: int, entries: int) -> bool:
        """Memory for at least so many slots of so many entries, if the budget allows the old beside the new."""
        is_empty = not self._claims
        shape = self._shape(slots, entries, 0 if is_empty else self.nbytes)
        if shape is None or shape == (self.slots, self.capacity):
            return shape is not None
        if is_empty:
            self._session.allocate(0, self._adapters)  # nothing to keep: the old memory goes first
            self.slots = self.capacity = 0
        else:
            self._arrange(min(shape[0], self.slots))
        self._session.resize(*shape)
        self.slots, self.capacity = shape
        if is_empty:
            self._middle = self.slots // 2
        return True

    def _shape(self, slots: int, entries: int, beside: int) -> tuple[int, int] | None:
        """Slots and capacity beside so many bytes: as many slots as fit, longer than needed where all of them fit."""
        roomy, tight = capacity_for(entries, self._session.limits.positions), _tight(self._session, entries)
        if self._count(roomy, beside) == self._most_slots:
            return self._most_slots, roomy
        count = self._count(tight, beside)
        return (count, tight) if count >= slots else None

    def _count(self, capacity: int, beside: int) -> int:
        """How many slots of this capacity the budget allows beside so many bytes."""
        if self._budget is None:
            return self._most_slots
        return min(self._most_slots, (self._budget - beside) // max(self._session.cache_bytes(1, capacity), 1))

    def _wastes(self, entries: int) -> bool:
        """Whether slots are more than twice as long as needed: a step reads all of it."""
        return self.capacity > 2 * capacity_for(entries, self._session.limits.positions)


def require_room(session: SlotSession, claim: Claim, budget: int | None) -> None:
    """Refuse a request that could not run even alone."""
    least = session.cache_bytes(claim.slots, _tight(session, needed_entries(session, claim)))
    if budget is not None and least > budget:
        raise InputError(
            "the request does not fit the K/V budget",
            got=f"{claim.entries} tokens in {claim.slots} slot{'s' if claim.is_gated else ''}, {least} bytes",
            need=f"at most {budget} bytes",
            fix="a larger K/V budget, a shorter prompt or fewer new tokens",
            code="E_KV_BUDGET",
        )


def needed_entries(session: SlotSession, claim: Claim) -> int:
    """Of each slot; a graph that writes its padding too writes one more in a row that rides along."""
    return claim.entries + (session.signature.cache_style is CacheStyle.ALIAS)


def _tight(session: SlotSession, entries: int) -> int:
    """The least capacity: whole grains, as far as the positions go."""
    return max(entries, min(-(-entries // GRAIN) * GRAIN, session.limits.positions))
