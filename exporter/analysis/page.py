"""The report as one HTML page that needs nothing else: plots are inlined, there is no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from exporter.analysis import plots
from exporter.analysis.conflicts import NEARLY_EMPTY
from exporter.analysis.report import ExpertStudy, Report

MOST_ROWS = 12  # of tables that could be as long as the model


def page(report: Report) -> str:
    """HTML; the same report gives the same page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "share": share, "size": size}
    source = files("exporter.analysis").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        r=report,
        figures=figures(report),
        thresholds=report.mixes.recommendation.thresholds,
        empty=[row for row in report.conflicts.norms if row.is_nearly_empty][:MOST_ROWS],
        empty_limit=NEARLY_EMPTY,
        conflicts=worst_pairs(report.conflicts),
        sharpest=sharpest_sites(report),
    )


def figures(report: Report) -> dict[str, Markup]:
    """Every plot that has something to show, as an image."""
    made = {"mixes": plots.mix_plot(report.mixes), "costs": plots.cost_plot(report.costs)}
    if report.gate is not None:
        made["gate"] = plots.gate_plot(report.gate, report.experts)
    if report.conflicts.norms:
        made["norms"] = plots.norm_plot(report.conflicts, report.experts)
    if report.conflicts.pairs:
        made["pairs"] = plots.pair_plot(report.conflicts, report.experts)
    if report.compression.schemes:
        made["errors"] = plots.error_plot(report.compression)
        made["compression"] = plots.compression_plot(report.compression)
    return {name: image(svg, name) for name, svg in made.items()}


def image(svg: bytes, name: str) -> Markup:
    """An SVG as an image of its own, so that no identifier of one plot meets another's."""
    data = base64.b64encode(svg).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(f"plot: {name}", data)


def worst_pairs(study: ExpertStudy) -> list[object]:
    """Where experts pull most against each other: sign conflict, largest first."""
    found = [row for row in study.pairs if row.sign_conflict is not None]
    return sorted(found, key=lambda row: -(row.sign_conflict or 0))[:MOST_ROWS]  # type: ignore[return-value]


def sharpest_sites(report: Report) -> Sequence[object]:
    """Where the token decides most."""
    if report.gate is None:
        return ()
    return sorted(report.gate.sites, key=lambda row: -row.information)[:MOST_ROWS]


def number(value: float | None) -> str:
    """Three digits; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(value: float | None) -> str:
    """Percent."""
    return "–" if value is None else f"{100 * value:.1f} %"


def size(value: float) -> str:
    """1.23 M: FLOPs, bytes, parameters alike."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"
