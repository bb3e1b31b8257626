"""R11: kill -9 at any moment of a build leaves the old bundle or the new one, and the next build clears the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def drive(task: str, folder: Path, count: int) -> dict[str, int]:
    """Run one task of publish_driver; its own assertions fail the test with their text."""
    command = [sys.executable, "-m", "tests.faults.publish_driver", task, str(folder), str(count)]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=1800
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, int] = json.loads(run.stdout)
    return result


def test_200_random_kills_corrupt_nothing(tmp_path: Path) -> None:
    result = drive("random", tmp_path, 200)
    assert result["old"] + result["new"] == 200
    assert result["killed"] >= 100
    assert min(result["old"], result["new"]) >= 10  # kills came both before and after the rename
    assert result["left"] == 0


def test_a_kill_at_every_file_operation_corrupts_nothing(tmp_path: Path) -> None:
    result = drive("each", tmp_path, 10_000)
    assert result["killed"] == result["points"] >= 40
    assert (result["missing"], result["left"]) == (0, 0)
    assert min(result["old"], result["new"]) > 0


def test_without_the_kernels_exchange_the_next_build_brings_the_old_bundle_back(tmp_path: Path) -> None:
    result = drive("each-without-exchange", tmp_path, 10_000)
    assert result["killed"] == result["points"] >= 40
    assert result["missing"] > 0  # the one window, documented in docs/bundle.md
    assert result["left"] == 0


@pytest.mark.long
def test_2000_random_kills_corrupt_nothing(tmp_path: Path) -> None:
    result = drive("random", tmp_path, 2000)
    assert result["old"] + result["new"] == 2000
    assert result["killed"] >= 1000
    assert result["left"] == 0
