"""The tables as pictures: SVG files that come out the same from the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from scripts.benchmark.subjects import OURS, Subject, Sweep
from scripts.benchmark.tables import Found, limit_rows, swept

STYLE = {
    "svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip
# Colours that the colour-blind tell apart (Okabe and Ito 2008); ours are the solid lines.
COLOURS = ("#0072b2", "#56b4e9", "#003f5c", "#d55e00", "#009e73", "#7fc97f", "#5b8c5a", "#cc79a7", "#e69f00")
AXES = {
    Sweep.CONTEXT: ("tokens of context", "ms per token"),
    Sweep.BATCH: ("rows in the batch", "ms per step"),
    Sweep.EXPERTS: ("experts", "ms per token"),
}


def draw(found: Found, folder: Path) -> dict[Sweep | str, str]:
    """Write all plots that have something to show; file names by what they show."""
    drawn: dict[Sweep | str, str] = {}
    with mpl.rc_context(STYLE):
        for sweep in Sweep:
            if len(found.plan.sweep(sweep)) > 1 and swept(found, sweep):
                drawn[sweep] = f"performance-{sweep}.svg"
                save(sweep_figure(found, sweep), folder / drawn[sweep])
        if limit_rows(found):
            drawn["limit"] = "performance-limit.svg"
            save(limit_figure(found), folder / drawn["limit"])
    return drawn


def save(figure: Any, path: Path) -> None:
    """Without the date, which would make each file another."""
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def sweep_figure(found: Found, sweep: Sweep) -> Any:
    """Medians as lines, quartiles as bars, both axes logarithmic; the legend from the slowest down."""
    figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
    cases = found.plan.sweep(sweep)
    for subject in swept(found, sweep):
        points = [(value, found.results.step_summary(subject.name, case)) for value, case in cases.items()]
        known = [(value, step) for value, step in points if step]
        if known:
            draw_line(axes, found, subject, known)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(cases))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=99))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=9)
    axes.set_xlabel(AXES[sweep][0])
    axes.set_ylabel(AXES[sweep][1])
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: -handles[place].get_children()[0].get_ydata()[-1])
    axes.legend(
        [handles[place] for place in order], [labels[place] for place in order],
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False,
    )  # fmt: skip
    return figure


def draw_line(axes: Any, found: Found, subject: Subject, known: Sequence[tuple[int, Any]]) -> None:
    """One subject's."""
    values = [value for value, _ in known]
    medians = [step.median for _, step in known]
    spreads = [[step.median - step.low for _, step in known], [step.high - step.median for _, step in known]]
    is_ours = subject in OURS
    axes.errorbar(
        values, medians, yerr=spreads, label=subject.name, color=colour(found, subject), capsize=2.5, elinewidth=1,
        marker="o" if is_ours else "s", markersize=5 if is_ours else 4, linewidth=2.2 if is_ours else 1.3,
        linestyle="-" if is_ours else "--",
    )  # fmt: skip


def limit_figure(found: Found) -> Any:
    """A bar for the measured step, a mark for what reading its bytes alone takes."""
    rows = [row for row in limit_rows(found) if "PEFT" not in row[""]]  # it would dwarf all others, and only computes
    figure, axes = plt.subplots(figsize=(8.5, 0.5 * len(rows) + 1.2), layout="constrained")
    by_name = {subject.name: subject for subject in found.subjects}
    for place, row in enumerate(reversed(rows)):
        measured, floor = float(row["measured, ms"]), float(row["floor, ms"])
        axes.barh(place, measured, height=0.62, color=colour(found, by_name[row[""]]), alpha=0.85)
        axes.plot([floor, floor], [place - 0.42, place + 0.42], color="black", linewidth=2.5)
        axes.annotate(f"{row['measured / floor']} ×", (max(measured, floor), place), (5, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row['']} ({row['MB read a token']} MB)" for row in reversed(rows)])
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)
    axes.set_xlabel("ms per token; the black mark: reading the same bytes at the measured bandwidth")
    return figure


def colour(found: Found, subject: Subject) -> str:
    """Of its place in the list."""
    return COLOURS[found.subjects.index(subject) % len(COLOURS)]
