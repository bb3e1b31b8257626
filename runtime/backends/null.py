"""The backend that computes nothing: zeros of the right shapes, so that the rest is testable without an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.rows import Rows, StepResult
from runtime.session import SessionSettings, StepLimits
from runtime.signature import GATE, LOGITS, Signature
from runtime.slots import Slots
from runtime.stacks import Stack


class NullSession:
    """Keeps lengths and limits like any session; logits and gate are zero, so greedy always picks token 0."""

    def __init__(self, graph: Path, signature: Signature, settings: SessionSettings) -> None:
        self.signature = signature
        self.provider = "null"
        self.limits = StepLimits(positions=settings.max_positions)
        self._slots = Slots(signature, settings.max_positions)
        self._vocab = int(_output_shape(signature, LOGITS)[-1])
        self._gate = tuple(int(size) for size in _output_shape(signature, GATE)[2:])  # (G, E); () without a gate

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[slots]: entries held per slot. A copy."""
        return self._slots.lengths.copy()

    def allocate(self, slots: int, adapters: Stack | None = None) -> None:
        """Start afresh with this many empty slots; adapters change nothing."""
        self._slots.allocate(slots)

    def cache_bytes(self, slots: int, capacity: int) -> int:
        """None: no K/V is kept."""
        return 0

    def resize(self, slots: int, capacity: int) -> None:
        """So many slots; those that stay keep their lengths."""
        self._slots.require_capacity(slots, capacity)
        self._slots.resize(slots)

    def move(self, source: int, target: int) -> None:
        """Give a slot's length to another one."""
        self._slots.move(source, target)

    def step(self, rows: Rows) -> StepResult:
        """Zeros [B, K, V] and, with a gate, zeros [B, S, G, E]."""
        self._slots.check(rows)
        self._slots.advance(rows)
        logits = np.zeros((*rows.logit_index.shape, self._vocab), np.float32)
        gate = np.zeros(rows.tokens.shape + self._gate, np.float32) if self._gate else None
        return StepResult(logits, gate)

    def truncate(self, slot: int, length: int) -> None:
        """Drop a slot's last entries down to `length`."""
        self._slots.truncate(slot, length)

    def reset(self) -> None:
        """Empty all slots."""
        self._slots.reset()

    def close(self) -> None:
        """Nothing to free."""


def _output_shape(signature: Signature, name: str) -> tuple[int | str, ...]:
    spec = signature.output(name)
    return spec.shape if spec else ()
