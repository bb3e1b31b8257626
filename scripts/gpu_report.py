"""The report of a GPU machine: what ran, what did not and why, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Status(StrEnum):
    """How a section ended."""

    OK = "ok"
    FAILED = "FAILED"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Section:
    """One thing that was tried. `rows` is a table: every row has the keys of the first."""

    name: str
    status: Status
    why: str = ""  # it failed or did not run
    rows: tuple[dict[str, Any], ...] = ()
    text: str = ""  # as a program printed it


@dataclass(slots=True)
class Report:
    """A machine and its sections."""

    machine: dict[str, str]
    sections: list[Section] = field(default_factory=list)
    is_complete: bool = False  # False while it is written section by section, and when it was ended early

    @property
    def has_failed(self) -> bool:
        """Whether anything that ran was wrong; what did not run is no failure, and no proof."""
        return any(section.status is Status.FAILED for section in self.sections)


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """report.json and report.md, each complete or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"report.json": json.dumps(asdict(report), indent=2) + "\n", "report.md": render(report)}
    for name, text in texts.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)
    return folder / "report.json", folder / "report.md"


def render(report: Report) -> str:
    """The page."""
    lines = ["# GPU report", "", *(f"- {name}: {value}" for name, value in report.machine.items()), ""]
    if not report.is_complete:
        lines += ["**Not complete: more sections were to follow.**", ""]
    lines += ["| section | result | why |", "|---|---|---|"]
    lines += [f"| {s.name} | {s.status} | {_cell(s.why)} |" for s in report.sections]
    for section in report.sections:
        if section.rows or section.text:
            lines += ["", f"## {section.name}", ""]
        lines += table(section.rows)
        if section.text:
            lines += ["```", section.text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of equal keys as a Markdown table."""
    if not rows:
        return []
    heads = list(rows[0])
    body = [f"| {' | '.join(_cell(row.get(head, '')) for head in heads)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *body]


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
