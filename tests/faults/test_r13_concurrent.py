"""R13: eight builders of one target at once, three killed: one whole bundle, no mixed files, clear losers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.test_r11_kill import drive


def test_20_rounds_of_8_builders(tmp_path: Path) -> None:
    result = drive("race", tmp_path, 20)
    assert result["rounds"] == 20
    assert result["winners"] <= 20
    assert result["losers"] >= 20 * 4
    assert result["killed"] >= 20
    assert result["left"] == 0


@pytest.mark.long
def test_100_rounds_of_8_builders(tmp_path: Path) -> None:
    result = drive("race", tmp_path, 100)
    assert result["losers"] >= 100 * 4
    assert result["left"] == 0
