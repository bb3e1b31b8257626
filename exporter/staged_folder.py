"""A folder that appears whole: filled beside its place under another name, then renamed onto it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.publish import swap
from runtime.errors import MachineError


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """An empty folder that becomes `out` at the end, in place of an old one; after an error nothing has changed.

    MachineError where the disk refuses; errors of the body pass as they are.
    """
    out = out.resolve()
    stage = out.with_name(f".{out.name}.stage-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _as_machine_error(out):
            stage.mkdir(parents=True)
        yield stage
        with _as_machine_error(out):
            _move_into_place(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move_into_place(stage: Path, out: Path) -> None:
    """One step, or where the system cannot exchange two names, with the old folder aside for a moment."""
    if not out.exists() or not any(out.iterdir()):
        stage.rename(out)
    elif not swap(stage, out):  # swapped, the stage's name holds the old one
        aside = stage.with_suffix(".old")
        out.rename(aside)
        try:
            stage.rename(out)
        except OSError:
            aside.rename(out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _as_machine_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise MachineError(what, where=str(out), fix="check the disk and its permissions", code="E_DISK") from error
