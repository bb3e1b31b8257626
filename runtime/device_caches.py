"""K/V in GPU memory: as runtime.caches, but nothing of it ever passes through the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import numpy as np
from numpy.typing import NDArray

from runtime.caches import CacheNames, cache_names, capacity_for
from runtime.device import ALIGNMENT, Device, Layout
from runtime.signature import Signature
from runtime.tensors import DTYPES


@dataclass(slots=True)
class DeviceGroup:
    """The caches of all carries with equal heads and dims, [N, slots, H, C, D] in one block; all of it finite."""

    names: CacheNames
    entry: int  # bytes of one entry: D elements
    slots: int = 0
    capacity: int = 0  # C
    address: int = 0

    @property
    def count(self) -> int:
        """N."""
        return len(self.names.inputs)

    def slot_address(self, number: int, slot: int) -> int:
        """Where cache `number` of a slot begins; its H, C, D and the next slots follow without a gap."""
        return self.address + (number * self.slots + slot) * self.names.heads * self.capacity * self.entry

    def block_bytes(self, capacity: int, slots: int | None = None) -> int:
        """Bytes of a whole block, of as many slots as now or of so many."""
        slots = self.slots if slots is None else slots
        return self.count * slots * self.names.heads * capacity * self.entry

    def fresh(self, address: int, rows: int, width: int) -> Layout:
        """The new entries of one step: N layers of [B, H, S, D], a row for each B and H, each layer aligned."""
        pitch = width * self.entry
        step = ALIGNMENT // gcd(ALIGNMENT, pitch)
        return Layout(address, pitch, -(-rows * self.names.heads // step) * step)

    def fresh_bytes(self, rows: int, width: int) -> int:
        """Bytes of the new entries of one step."""
        layout = self.fresh(0, rows, width)
        return self.count * layout.pitch * layout.height

    def layout(self, slot: int, start: int) -> Layout:
        """The entries from `start` on, of the slots from `slot` on: N layers, a row for each slot and head."""
        heads = self.names.heads
        return Layout(self.address, self.capacity * self.entry, self.slots * heads, start * self.entry, slot * heads)

    def copy_to(self, device: Device, address: int, capacity: int, slots: int | None = None) -> None:
        """Copy the entries that fit into a block of another size."""
        slots = self.slots if slots is None else slots
        other = Layout(address, capacity * self.entry, slots * self.names.heads)
        width, height = min(self.capacity, capacity) * self.entry, min(self.slots, slots) * self.names.heads
        device.copy(self.layout(0, 0), other, width, height, self.count)

    def move(self, device: Device, source: int, target: int, length: int) -> None:
        """Copy the first entries of one slot over those of another."""
        device.copy(self.layout(source, 0), self.layout(target, 0), length * self.entry, self.names.heads, self.count)

    def write(
        self, device: Device, fresh: int, width: int, slots: slice, past: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> None:
        """Append the first counts[b] of fresh [N, B, H, S, D] at each row's own length past[b]."""
        heads, rows = self.names.heads, len(past)
        source = self.fresh(fresh, rows, width)
        if (past == past[0]).all() and (counts == counts[0]).all():
            target = self.layout(slots.start, int(past[0]))
            device.copy(source, target, int(counts[0]) * self.entry, rows * heads, self.count)
            return
        for row, (start, count) in enumerate(zip(past.tolist(), counts.tolist(), strict=True)):
            target = self.layout(slots.start + row, start)
            device.copy(replace(source, y=row * heads), target, count * self.entry, heads, self.count)

    def clear(self, device: Device, slots: slice, starts: NDArray[np.int64], width: int) -> None:
        """Zero `width` entries from starts[b] on, as far as the capacity goes."""
        for row, start in enumerate(starts.tolist()):
            count = min(width, self.capacity - start)
            for number in range(self.count):
                target = Layout(
                    self.slot_address(number, slots.start + row), self.capacity * self.entry, 0, start * self.entry
                )
                device.zero(target, count * self.entry, self.names.heads)


class DeviceCaches:
    """All cache groups of one session on one GPU, with one capacity C: `fixed`, or grown as needed."""

    def __init__(self, device: Device, signature: Signature, max_positions: int, fixed: int | None = None) -> None:
        self._device, self._max_positions, self._fixed = device, max_positions, fixed
        self._step = capacity_step(signature)
        self.capacity = 0
        self.groups = [DeviceGroup(names, entry_bytes(names)) for names in cache_names(signature)]

    def allocate(self, slots: int) -> None:
        """Forget everything; capacity 0."""
        self.capacity = 0
        for group in self.groups:
            if group.address:
                self._device.free(group.address)
            group.slots, group.capacity, group.address = slots, 0, 0

    def capacity_with(self, needed: int) -> int:
        """The capacity once there is room for `needed` entries a slot."""
        if self._fixed is None and needed <= self.capacity:
            return self.capacity
        return self._whole(capacity_for(needed, self._max_positions))

    def nbytes(self, slots: int, capacity: int) -> int:
        """What so many slots with room for `capacity` entries take."""
        return sum(group.block_bytes(self._whole(capacity), slots) for group in self.groups)

    def reserve(self, needed: int) -> bool:
        """Make room for `needed` entries a slot; True when the memory moved. Without memory nothing changes."""
        capacity = self.capacity_with(needed)
        if capacity == self.capacity:
            return False
        self._rebuild(None, capacity)
        return True

    def resize(self, slots: int, capacity: int) -> None:
        """So many slots with room for `capacity` entries; those that stay keep theirs. Without memory no change."""
        self._rebuild(slots, self._whole(capacity))

    def _whole(self, capacity: int) -> int:
        """The capacity that a block really has."""
        return self._fixed if self._fixed is not None else -(-capacity // self._step) * self._step

    def _rebuild(self, slots: int | None, capacity: int) -> None:
        """Copy into blocks of another size; None: for as many slots as before."""
        blocks: list[int] = []
        try:
            for group in self.groups:
                blocks.append(self._device.allocate_zeroed(group.block_bytes(capacity, slots)))
                group.copy_to(self._device, blocks[-1], capacity, slots)
        except BaseException:
            for block in blocks:
                self._device.free(block)
            raise
        self.capacity = capacity
        for group, block in zip(self.groups, blocks, strict=True):
            old, group.address, group.capacity = group.address, block, capacity
            group.slots = group.slots if slots is None else slots
            if old:
                self._device.free(old)


def entry_bytes(names: CacheNames) -> int:
    """Bytes of one entry."""
    return names.dim * DTYPES[names.dtype].itemsize


def capacity_step(signature: Signature) -> int:
    """Capacities are multiples of it, so that the caches of every slot begin at an aligned address."""
    return max((ALIGNMENT // gcd(ALIGNMENT, n.heads * entry_bytes(n)) for n in cache_names(signature)), default=1)
