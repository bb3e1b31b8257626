"""The fixture that the tests on a GPU share with those of the exporter, apart from whatever those import besides."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.exporter.tiny_builds import Built, build_family


@pytest.fixture(scope="session")
def family_build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """family -> its dynamic portable bundle, built (and so verified) on first use. Nobody may change its files."""
    made: dict[str, Built] = {}

    def get(family: str) -> Built:
        if family not in made:
            made[family] = build_family(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get
