"""The null backend: right shapes, lengths and limits, nothing computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.backends import open_session
from runtime.errors import InputError
from runtime.rows import Rows
from runtime.session import SessionSettings
from tests.runtime.tiny_graphs import TinyShape


def test_shapes_lengths_and_limits() -> None:
    shape = TinyShape(max_positions=6)
    session = open_session("null", Path("nowhere.onnx"), shape.signature, SessionSettings(6))
    session.allocate(3)
    scalings = np.zeros((2, 4, shape.blocks, shape.experts), np.float32)
    rows = Rows(np.ones((2, 4), np.int64), np.array([4, 2]), slice(1, 3), scalings, np.array([[3], [1]]))
    result = session.step(rows)
    assert result.logits.shape == (2, 1, shape.vocab)
    assert result.gate is not None
    assert result.gate.shape == scalings.shape
    assert session.lengths.tolist() == [0, 4, 2]
    with pytest.raises(InputError, match="past the model's positions"):
        session.step(rows)
    session.truncate(1, 1)
    assert session.lengths.tolist() == [0, 1, 2]
    session.reset()
    assert session.lengths.tolist() == [0, 0, 0]
    session.close()
