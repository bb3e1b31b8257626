"""Where slots lie, so that those a step continues are always slots in a row: pure arithmetic, no K/V."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Plan(Generic[Key]):
    """Where each slot is to lie, and the copies that bring it about, in an order that overwrites nothing."""

    places: Mapping[Key, int]
    moves: Sequence[tuple[int, int]]  # source, target: the target is free by then


def plan_places(held: Mapping[Key, int], segments: Sequence[Sequence[Key]], start: int) -> Plan[Key]:
    """Lay the segments one behind the other from `start` on; the order within a segment is free.

    `held`: where some of the keys lie now, each segment's left of the next one's. A key that lies within its segment's
    range stays; the others, new ones among them, take what is free there in their order. So a key that leaves costs a
    move for its own segment and for each one behind it, whatever their lengths.

    The moves never form a circle: between two segments either keys of the left one lie too far right, or keys of the
    right one too far left, never both, since their old border was on one side of the new one.
    """
    places: dict[Key, int] = {}
    for segment in segments:
        span = range(start, start + len(segment))
        places |= {key: held[key] for key in segment if held.get(key, -1) in span}
        taken = set(places.values())
        free = iter([place for place in span if place not in taken])
        places |= {key: next(free) for key in segment if key not in places}
        start = span.stop
    return Plan(places, _ordered({held[key]: place for key, place in places.items() if held.get(key, place) != place},
                                 set(held.values())))  # fmt: skip


def _ordered(moves: dict[int, int], taken: set[int]) -> list[tuple[int, int]]:
    """The moves source -> target, each after the one that frees its target."""
    ordered: list[tuple[int, int]] = []
    while moves:
        ready = {source: target for source, target in moves.items() if target not in taken}
        assert ready, "no circles"
        for source, target in ready.items():
            ordered.append((source, target))
            taken = (taken - {source}) | {target}
            del moves[source]
    return ordered
