"""Fixtures of more than one folder: a fake GPU, and bundles with engines beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.engines import engines_root
from tests.runtime.engine_bundles import SMALL, engines_for
from tests.runtime.fake_tensorrt import FakeTensorrt, install
from tests.runtime.tiny_bundles import tiny_bundle


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorrt]:
    """A machine with a GPU, which must be left empty."""
    trt = install(monkeypatch)
    yield trt
    assert not trt.driver.leaks
    assert (trt.alive, trt.torn) == (0, 0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and its engines, not to be touched."""
    path = tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", end=())
    engines_for(path, SMALL)
    return path


@pytest.fixture
def built_copy(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(engines_root(built), engines_root(tmp_path / "tiny"))
    return Path(shutil.copytree(built, tmp_path / "tiny"))
