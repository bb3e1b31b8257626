"""The report's folder appears whole: written beside its place under another name, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from exporter.analysis.report import Report
from exporter.errors import ExportError
from exporter.staged_folder import staged_folder
from runtime.errors import MachineError
from runtime.mix_file import MixFile, write_mix

PAGE, NUMBERS, MIX = "report.html", "report.json", "mix.json"
FILES = {PAGE, NUMBERS, MIX}


def check_outside(out: Path, bundle: Path) -> None:
    """Refuse a report inside the bundle: a bundle with a file that it does not list cannot be opened."""
    if out.resolve().is_relative_to(bundle.resolve()):
        fix = "choose a folder outside the bundle"
        raise ExportError("lies inside the bundle", where="--out", got=str(out), fix=fix, code="E_PATH")


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
    try:
        with staged_folder(out) as stage:
            _write(stage / PAGE, html)
            _write(stage / NUMBERS, report.model_dump_json(indent=2) + "\n")
            write_mix(mix, stage / MIX)
            check_target(out, overwrite=overwrite)  # it may have appeared meanwhile
    except OSError as error:
        what = f"{error.strerror or error}; nothing was published"
        raise MachineError(what, where=str(error.filename or out), fix="check the disk", code="E_DISK") from error


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
