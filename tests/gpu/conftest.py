"""Tests marked `gpu` say by themselves why they do not run."""

from __future__ import annotations

import pytest

from runtime.engines import Target
from scripts.gpu_machine import usable_target, why_not
from tests.exporter.family_builds import family_build

__all__ = ["family_build"]  # a fixture


@pytest.fixture(scope="session")
def target() -> Target:
    """The TensorRT that engines are built for here; a skip with the reason where none can run."""
    if reason := why_not():
        pytest.skip(reason)
    return usable_target()
