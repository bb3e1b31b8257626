"""The one contract of every backend: a graph with its K/V caches."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.quantization import QuantizationInfo
from runtime.rows import Rows, StepResult
from runtime.signature import Signature
from runtime.stacks import Stack


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How to open a graph."""

    max_positions: int  # no slot may grow longer
    provider: str = "cpu"  # ONNX Runtime's: cpu | cuda | tensorrt | nv-tensorrt-rtx
    threads: int | None = None  # None: the backend's choice
    mapped: bool = False  # keep weights in their mapped file: less memory, slower steps
    # Other values of stored weights, by initializer (ort only); the arrays must outlive the session.
    weights: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    quantization: QuantizationInfo | None = None  # of the graph's weights


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most that a session takes; generation keeps to it by smaller batches and chunks."""

    positions: int  # entries of a slot
    rows: int = sys.maxsize  # of one step
    decode_rows: int = sys.maxsize  # of a step of one token a row
    tokens: int = sys.maxsize  # of one row of a step
    logits: int = sys.maxsize  # positions of a row of which a step gives logits
    fix: str = ""  # what raises them, where they are not the model's own


class Session(Protocol):
    """A loaded graph that owns its K/V caches in numbered slots. One slot is one append-only stream of tokens.

    An X-LoRA request uses two slots: the scaling pass and the main pass.
    With `CacheStyle.NONE` nothing is kept: lengths stay 0 and each step brings the whole sequence.
    """

    signature: Signature
    provider: str  # the one that really runs
    limits: StepLimits

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[slots]: entries held per slot. A copy."""

    def allocate(self, slots: int, adapters: Stack | None = None) -> None:
        """Start afresh with this many empty slots.

        `adapters` feed a graph whose adapters are inputs, until the next `allocate`: so no K/V and no bound call ever
        outlives the adapters it was made with. Nothing of them is kept once other ones, or none, come.
        """

    def step(self, rows: Rows) -> StepResult:
        """Run the graph on `rows`, append their K/V to their slots; positions continue at each slot's length.

        All or nothing: after an error (`InputError`: too many positions, `NumericError`: NaN) no slot has changed.
        """

    def truncate(self, slot: int, length: int) -> None:
        """Drop a slot's last entries down to `length`, without copying."""

    def reset(self) -> None:
        """Empty all slots, keeping their memory."""

    def close(self) -> None:
        """Free the caches and the engine."""


class SlotSession(Session, Protocol):
    """A session whose slots may be rearranged while they hold K/V: what requests that come and go need."""

    def cache_bytes(self, slots: int, capacity: int) -> int:
        """What the K/V of so many slots take, with room for `capacity` entries each."""

    def resize(self, slots: int, capacity: int) -> None:
        """So many slots, new ones empty, each with room for `capacity` entries; those that stay keep theirs.

        The old memory and the new lie side by side meanwhile. Without memory for it nothing changes.
        """

    def move(self, source: int, target: int) -> None:
        """Copy a slot's entries into another one, in place of what that held; the source is empty then."""
