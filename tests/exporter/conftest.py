"""Exports are the dear part of these tests: one portable bundle a family, shared by all modules of a run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.exporter.hot_makers import HotWorld, make_world
from tests.exporter.tiny_builds import Built, build_family


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors of these sizes only lose by threads, most of all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family_build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """family -> its dynamic portable bundle, built (and so verified) on first use. Nobody may change its files."""
    made: dict[str, Built] = {}

    def get(family: str) -> Built:
        if family not in made:
            made[family] = build_family(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> HotWorld:
    """A bundle whose adapters are inputs, with folders to load. Nobody may change its files."""
    return make_world(tmp_path_factory.mktemp("hot"))
