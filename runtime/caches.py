"""Host memory for K/V: every slot's entries, grown in steps, written at each row's own length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.signature import Signature, TensorSpec

GRAIN = 64  # capacities are multiples of it


def capacity_for(needed: int, max_positions: int) -> int:
    """The capacity to grow to: an eighth more than needed, in whole grains, no more than a slot may ever hold.

    A step reads the whole capacity, so little slack is cheaper than rare growth.
    """
    rounded = -(-(needed + needed // 8) // GRAIN) * GRAIN
    return min(rounded, max(needed, max_positions))


@dataclass(frozen=True, slots=True)
class CacheNames:
    """The carries that share one block of memory."""

    inputs: tuple[str, ...]  # N graph inputs
    outputs: tuple[str, ...]  # their N outputs
    heads: int
    dim: int
    dtype: str


@dataclass(slots=True)
class CacheGroup:
    """The caches of all carries with equal heads and dims: one block of memory, so that a write is one call."""

    inputs: tuple[str, ...]  # N graph inputs
    outputs: tuple[str, ...]  # their N outputs
    heads: int
    dim: int
    dtype: np.dtype[np.generic]
    memory: NDArray[np.generic]  # [N, slots, H, C, D]; all of it finite: a masked NaN would still poison

    def grow(self, capacity: int) -> None:
        """Copy into a larger, zeroed block."""
        old = self.memory
        self.memory = np.zeros((*old.shape[:3], capacity, self.dim), self.dtype)
        self.memory[:, :, :, : old.shape[3]] = old

    def resized(self, slots: int, capacity: int) -> NDArray[np.generic]:
        """A zeroed block of another size with the entries that fit."""
        old = self.memory[:, :slots, :, :capacity]
        memory: NDArray[np.generic] = np.zeros((len(self.inputs), slots, self.heads, capacity, self.dim), self.dtype)
        memory[:, : old.shape[1], :, : old.shape[3]] = old
        return memory

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first entries of one slot over those of another."""
        self.memory[:, target, :, :length] = self.memory[:, source, :, :length]

    def write(
        self, fresh: NDArray[np.generic], slots: slice, past: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> None:
        """Append the first counts[b] of fresh [N, B, H, S, D] at each row's own length past[b]."""
        target = self.memory[:, slots]  # [N, B, H, C, D], a view
        if (past == past[0]).all() and (counts == counts[0]).all():
            start, stop = int(past[0]), int(past[0] + counts[0])
            target[:, :, :, start:stop] = fresh[:, :, :, : stop - start]
            return
        for row, (start, count) in enumerate(zip(past.tolist(), counts.tolist(), strict=True)):
            target[:, row, :, start : start + count] = fresh[:, row, :, :count]

    def clear(self, slots: slice, starts: NDArray[np.int64], width: int) -> None:
        """Zero `width` entries from starts[b] on."""
        for row, start in enumerate(starts.tolist()):
            self.memory[:, slots][:, row, :, start : start + width] = 0


class Caches:
    """All cache groups of one session, with one capacity C."""

    def __init__(self, signature: Signature, dtypes: Mapping[str, np.dtype[np.generic]], max_positions: int) -> None:
        self._max_positions = max_positions
        self.capacity = 0
        self.groups = tuple(
            CacheGroup(names.inputs, names.outputs, names.heads, names.dim, dtypes[names.dtype], np.zeros(0))
            for names in cache_names(signature)
        )
        self.allocate(0)

    def allocate(self, slots: int) -> None:
        """Forget everything; capacity 0."""
        self.capacity = 0
        for group in self.groups:
            group.memory = np.zeros((len(group.inputs), slots, group.heads, 0, group.dim), group.dtype)

    def reserve(self, needed: int) -> bool:
        """Make room for `needed` entries a slot; True when the memory moved."""
        if needed <= self.capacity:
            return False
        self.capacity = capacity_for(needed, self._max_positions)
        for group in self.groups:
            group.grow(self.capacity)
        return True

    def resize(self, slots: int, capacity: int) -> None:
        """So many slots of at least this capacity; memory for all of it is there before anything changes."""
        blocks = [group.resized(slots, capacity) for group in self.groups]
        self.capacity = capacity
        for group, block in zip(self.groups, blocks, strict=True):
            group.memory = block

    def nbytes(self, slots: int, capacity: int) -> int:
        """What so many slots of this capacity take."""
        return sum(len(g.inputs) * slots * g.heads * capacity * g.dim * g.dtype.itemsize for g in self.groups)


def cache_names(signature: Signature) -> tuple[CacheNames, ...]:
    """The carries of a signature, those of equal heads, dims and dtype together."""
    members: dict[tuple[int, int, str], list[tuple[str, str]]] = {}
    for carry in signature.carries:
        spec = signature.input(carry.input)
        if spec is not None:
            members.setdefault(_group_key(spec), []).append((carry.input, carry.output))
    groups = []
    for (heads, dim, dtype), pairs in members.items():
        inputs, outputs = zip(*pairs, strict=True)
        groups.append(CacheNames(inputs, outputs, heads, dim, dtype))
    return tuple(groups)


def _group_key(spec: TensorSpec) -> tuple[int, int, str]:
    _, heads, _, dim = spec.shape
    return int(heads), int(dim), spec.dtype
