"""Fixtures of the runtime's tests; each file brings the model that it means."""

from __future__ import annotations

import pytest

from runtime.model import Model
from runtime.rows import Rows


@pytest.fixture
def steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """What the model's session is asked."""
    seen: list[Rows] = []
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda rows: seen.append(rows) or step(rows))
    return seen
