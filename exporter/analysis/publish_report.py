"""The report's folder appears whole: written beside its place under another name, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from exporter.analysis.report import Report
from exporter.errors import ExportError
from exporter.publish import swap
from runtime.errors import MachineError
from runtime.mix_file import MixFile, write_mix

PAGE, NUMBERS, MIX = "report.html", "report.json", "mix.json"
FILES = {PAGE, NUMBERS, MIX}


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse a target before any work: only a report is ever replaced, and only when asked."""
    if not os.path.lexists(out):
        if not out.absolute().parent.is_dir():
            raise ExportError("no such folder", where="--out", got=str(out.absolute().parent), code="E_PATH")
        return
    if out.is_symlink() or not out.is_dir() or not {path.name for path in out.iterdir()} <= FILES:
        raise ExportError(
            "exists and is not (only) a report, so it is never overwritten",
            where=str(out),
            fix="choose another --out, or remove it yourself",
            code="E_EXISTS",
        )
    if not overwrite:
        fix = "choose another --out, or give --overwrite"
        raise ExportError("this report exists already", where=str(out), fix=fix, code="E_EXISTS")


def publish_report(out: Path, report: Report, html: str, mix: MixFile, *, overwrite: bool = False) -> None:
    """Page, numbers and mix, all or nothing."""
    out = out.absolute()
    stage = out.with_name(f".{out.name}.stage-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        stage.mkdir()
        _write(stage / PAGE, html)
        _write(stage / NUMBERS, report.model_dump_json(indent=2) + "\n")
        write_mix(mix, stage / MIX)
        check_target(out, overwrite=overwrite)  # it may have appeared meanwhile
        _move(stage, out)
    except OSError as error:
        what = f"{error.strerror or error}; nothing was published"
        raise MachineError(what, where=str(error.filename or out), fix="check the disk", code="E_DISK") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move(stage: Path, out: Path) -> None:
    """Rename; over an old report in one step, or where the system has none with the old one aside for a moment."""
    if not out.exists() or not any(out.iterdir()):
        stage.rename(out)
    elif not swap(stage, out):
        aside = stage.with_suffix(".old")
        out.rename(aside)
        try:
            stage.rename(out)
        except OSError:
            aside.rename(out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
