"""What several files of tests need is made once a run, by whichever of its processes needs it first."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

T = TypeVar("T")


def once_a_run(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """`make(folder)`, or a copy of what another process made of it; nobody may change the folder afterwards."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each process has a folder of its own in it
    folder, answer = root / f"shared-{name}", root / f"shared-{name}.pickle"
    with FileLock(root / f"shared-{name}.lock"):
        if answer.exists():
            return pickle.loads(answer.read_bytes())  # type: ignore[no-any-return]
        shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
        folder.mkdir()
        value = make(folder)
        part = answer.with_suffix(".part")
        part.write_bytes(pickle.dumps(value))
        part.rename(answer)
        return value
