"""The fixture that the tests on a GPU share with those of the exporter, apart from whatever those import besides."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.exporter.once_a_run import once_a_run
from tests.exporter.tiny_builds import Built, build_family


@pytest.fixture(scope="session")
def family_build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """family -> its dynamic portable bundle, built (and so verified) on first use. Nobody may change its files."""
    made: dict[str, Built] = {}

    def get(family: str) -> Built:
        if family not in made:
            made[family] = once_a_run(tmp_path_factory, family, lambda folder: build_family(folder, family))
        return made[family]

    return get
