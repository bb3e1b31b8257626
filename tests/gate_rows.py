"""Rows of logits that a gate must survive: what hypothesis draws for the gate, its plugin and the plugin's fallback."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

HUGE = 65_504.0  # the largest fp16 number
ROWS = 20  # an example is this many rows: 500 examples are 10,000
Rows = NDArray[np.float32]

KINDS = ("masked", "equal", "highest", "lowest", "edges", "spread")


@st.composite
def logits(draw: st.DrawFn) -> Rows:
    """[ROWS, K], K of 1 to 64: rows all masked (zero), all equal, at the edges of fp16, and anything below them."""
    experts = draw(st.integers(1, 64))
    value = np.float32(draw(st.floats(-HUGE, HUGE, width=32)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = {
        "masked": lambda: np.zeros(experts),
        "equal": lambda: np.full(experts, value),
        "highest": lambda: np.full(experts, HUGE),
        "lowest": lambda: np.full(experts, -HUGE),
        "edges": lambda: random.choice([0.0, -0.0, 1e-30, HUGE, -HUGE], experts),
        "spread": lambda: random.uniform(-abs(value), abs(value), experts),
    }
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=ROWS, max_size=ROWS))
    return np.stack([made[kind]() for kind in kinds]).astype(np.float32)
