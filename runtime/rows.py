"""What one engine step carries in and out: rows of tokens, their scalings and cache slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rows:
    """One step for B rows. Rows may differ in length: row b has `counts[b]` real tokens, then right padding.

    Real tokens never attend to padding (causal), and padding is never appended to the cache.
    A row with count 0 rides along without effect.
    """

    tokens: NDArray[np.int64]  # [B, S]
    counts: NDArray[np.int64]  # [B], 0..S
    slots: slice  # which B consecutive cache slots the rows continue
    scalings: NDArray[np.float32] | None  # [B, S, G, E]; None for a graph without scalings
    logit_index: NDArray[np.int64]  # [B, K] positions along S; K = 0: no lm_head work
    router: NDArray[np.float32] | None = None  # [B], 1 or 0: routed inside the sites or not; None: no such router


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gives back to the host; K/V stay with the session."""

    logits: NDArray[np.float32]  # [B, K, V]
    gate: NDArray[np.float32] | None  # [B, S, G, E]
