"""The plots of the page, each as SVG bytes, in colours that the colour-blind tell apart (Okabe and Ito; cividis)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike, NDArray

from exporter.analysis.report import CompressionStudy, CostTable, ExpertStudy, GateStatistics, MixStudy
from exporter.mixture import blocks_of

Wide = NDArray[np.float64]
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666", "#000000")
GREY, ACCENT = "#9aa3ad", "#0072B2"
FEW = 6  # experts whose names and numbers fit into a quarter of the width
WIDTH = 9.4  # inches at 100 dots each: fits into 1000 px with the page's margins
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path", "svg.hashsalt": "analysis", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#6b7280", "axes.labelcolor": "#374151",
    "xtick.color": "#374151", "ytick.color": "#374151", "axes.titlesize": 9.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip


def gate_plot(gate: GateStatistics, experts: Sequence[str]) -> bytes:
    """Left: mean scalings by block, stacked. Right: mean scalings, deviation and top-1 share by site."""

    def draw(figure: Figure) -> None:
        blocks, *sites = figure.subplots(1, 4, width_ratios=(1.5, 1, 1, 1))
        rows = gate.blocks[::-1]
        masses = np.array([[row.mass[name] for row in rows] for name in experts])
        for number, (name, mass, left) in enumerate(zip(experts, masses, starts_of(masses), strict=True)):
            blocks.barh(np.arange(len(rows)), mass, left=left, color=_colour(number), label=name, height=0.75)
        labels = shortened([row.name for row in rows])
        _some_ticks(blocks.set_yticks, labels)
        blocks.set_title("mean scaling by block")
        figure.legend(*blocks.get_legend_handles_labels(), loc="outside lower center", ncols=5, handlelength=1)
        parts = ("mass", "mean scaling"), ("deviation", "its deviation"), ("top1", "top-1 share")
        names = [row.name for row in gate.sites]
        for axes, (field, title) in zip(sites, parts, strict=True):
            values = [[getattr(row, field)[name] for name in experts] for row in gate.sites]
            _heat(axes, values, experts, names, (min(0, np.min(values)), None), labelled=field == "mass")
            axes.set_title(title)

    return drawn(draw, max(2.6, 0.17 * len(gate.sites) + 1.2))


def mix_plot(study: MixStudy) -> bytes:
    """Perplexity, distance and agreement of every variant."""
    scores = study.scores[::-1]
    recommended = study.recommendation.mix

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 3, sharey=True)
        places = np.arange(len(scores))
        colours = [
            ACCENT if s.name == study.reference else "#E69F00" if s.name == recommended else GREY for s in scores
        ]
        parts = (
            ("perplexity", [s.perplexity for s in scores], True),
            (f"KL from the {study.reference}, nats", [s.divergence for s in scores], False),
            (f"same top token as the {study.reference}", [s.agreement for s in scores], False),
        )
        for axis, (title, values, is_log) in zip(axes, parts, strict=True):
            axis.barh(places, values, color=colours, height=0.7)
            axis.set_title(title)
            if is_log and max(values) > 20 * min(values):
                axis.set_xscale("log")
            for place, value in zip(places, values, strict=True):
                axis.annotate(
                    f"{value:,.0f}" if value >= 1000 else f"{value:.3g}",
                    (value, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            axis.margins(x=0.18)
        axes[0].set_yticks(places, [s.name for s in scores])

    return drawn(draw, 0.8 + 0.27 * len(scores))


def pair_plot(study: ExpertStudy, experts: Sequence[str]) -> bytes:
    """One matrix a measure, means over the sites that both experts change; a dash where there is none."""
    names = list(experts)
    rows = 1 if len(names) <= FEW else 2
    measures = (
        ("input_overlap", "overlap of inputs (a)", (0, 1), "cividis"),
        ("output_overlap", "overlap of outputs (b)", (0, 1), "cividis"),
        ("sign_conflict", "sign conflict", (0, 1), "PuOr_r"),
        ("cosine", "cosine of deltas", (-1, 1), "PuOr"),
    )

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, 4 // rows).flat
        for axes, (field, title, limits, colours) in zip(panels, measures, strict=True):
            values = np.full((len(names), len(names)), np.nan)
            for first in range(len(names)):
                for second in range(first):
                    pair = {names[first], names[second]}
                    found = [getattr(p, field) for p in study.pairs if {p.first, p.second} == pair]
                    kept = [value for value in found if value is not None]
                    values[first, second] = np.mean(kept) if kept else np.nan
            is_few = len(names) <= 2 * FEW
            _heat(axes, values[1:, :-1], names[:-1], names[1:], limits, colours=colours, numbers=is_few)
            axes.set_facecolor("white")
            for row, column in np.argwhere(np.isnan(np.where(np.tri(len(names) - 1) > 0, values[1:, :-1], 0))):
                axes.text(column, row, "–", ha="center", va="center", color="#6b7280")
            axes.set_title(title)

    return drawn(draw, rows * (1.1 + 0.42 / rows * len(names)))


def norm_plot(study: ExpertStudy, experts: Sequence[str]) -> bytes:
    """Relative norm and density of every delta; pale where an expert does not touch a site."""
    sites = list(dict.fromkeys(row.site for row in study.norms))
    norms, density = np.full((len(sites), len(experts)), np.nan), np.full((len(sites), len(experts)), np.nan)
    for row in study.norms:
        place = sites.index(row.site), list(experts).index(row.expert)
        norms[place], density[place] = row.relative_norm, row.density

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        is_few = len(sites) <= 40
        _heat(left, norms, experts, sites, (0, None), numbers=is_few)
        left.set_title("norm of the delta / norm of the base weight")
        _heat(right, density, experts, sites, (0, 0.7), numbers=is_few, labelled=False)
        right.set_title("density: 0.64 Gaussian, towards 0 in few entries")

    return drawn(draw, max(2.4, 0.19 * len(sites) + 0.9))


def error_plot(study: CompressionStudy) -> bytes:
    """One panel a scheme: a row a site, a column a bin of |error| / rms(weight), shares of the entries as colour."""
    sites = [site.site for site in study.schemes[0].sites]
    powers = ((place, float(np.log10(edge))) for place, edge in enumerate(study.bins))
    ticks = [
        (place, round(power)) for place, power in powers if abs(power - round(power)) < 0.01 and round(power) % 2 == 0
    ]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(study.schemes))
        for number, (axes, scheme) in enumerate(zip(panels, study.schemes, strict=True)):
            counts = np.array([site.counts for site in scheme.sites], np.float64)
            shares = counts / counts.sum(1, keepdims=True)
            _heat(axes, shares, [], sites, (0, 0.35), labelled=number == 0, bar=number == len(panels) - 1)
            axes.set_xticks([place + 0.5 for place, _ in ticks], [f"$10^{{{power}}}$" for _, power in ticks])
            axes.set_title(scheme.scheme)
            axes.set_xlabel("|error| / rms")

    return drawn(draw, max(2.6, 0.17 * len(sites) + 1.0))


def compression_plot(study: CompressionStudy) -> bytes:
    """What each scheme does to the whole model, against the bytes it needs."""

    def draw(figure: Figure) -> None:
        parts = (
            ("relative_error", "error of the weights"),
            ("divergence", "KL, nats"),
            ("loss", "loss added, nats a token"),
        )
        assert study.uncompressed is not None
        for axes, (field, title) in zip(figure.subplots(1, 3), parts, strict=True):
            for scheme in study.schemes:
                value = scheme.relative_error if field == "relative_error" else getattr(scheme.score, field)
                value = value - study.uncompressed.loss if field == "loss" else value
                is_svd = scheme.scheme.startswith("svd")
                axes.plot(
                    scheme.bytes / scheme.bytes_before, max(value, 1e-9), "s" if is_svd else "o", ms=8,
                    color=COLOURS[5] if is_svd else ACCENT,
                )  # fmt: skip
                axes.annotate(scheme.scheme, (scheme.bytes / scheme.bytes_before, max(value, 1e-9)), (7, -3),
                              textcoords="offset points", fontsize=8)  # fmt: skip
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("bytes / bytes before")
            axes.margins(x=0.45, y=0.15)
            axes.grid(axis="y", color="#e5e7eb")

    return drawn(draw, 2.7)


def cost_plot(costs: CostTable) -> bytes:
    """FLOPs and bytes of a token, all its passes, by part."""
    rows = costs.rows[::-1]

    def draw(figure: Figure) -> None:
        flops, sizes = figure.subplots(1, 2, sharey=True)
        parts = list(dict.fromkeys(part for row in rows for one in row.passes for part in one.flops_by_part))
        for axes, field, title in ((flops, "flops_by_part", "FLOPs"), (sizes, "weight_bytes_by_part", "bytes read")):
            left = np.zeros(len(rows))
            for number, part in enumerate([*parts, "K/V cache"]):
                if part == "K/V cache":
                    values = [sum(one.cache_bytes for one in row.passes) * (field != "flops_by_part") for row in rows]
                else:
                    values = [sum(getattr(one, field).get(part, 0) for one in row.passes) for row in rows]
                axes.barh(np.arange(len(rows)), values, left=left, color=_colour(number), label=part, height=0.65)
                left += np.array(values)
            axes.set_title(f"{title} of a token, all passes")
            axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=" "))
            axes.margins(x=0.03)
        flops.set_yticks(np.arange(len(rows)), [row.name for row in rows])
        figure.legend(*flops.get_legend_handles_labels(), loc="outside lower center", ncols=6, handlelength=1)

    return drawn(draw, 1.3 + 0.3 * len(rows))


def drawn(draw: Callable[[Figure], None], height: float) -> bytes:
    """One figure as SVG; no state of pyplot, the same bytes for the same numbers."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def starts_of(bars: Wide) -> Wide:
    """Where bars [E, N] begin when they are stacked from 0 on: a gate without softmax has negative ones, too."""
    sides = np.minimum(bars, 0), np.maximum(bars, 0)
    behind, ahead = (np.cumsum(side, 0) - side for side in sides)
    return np.where(bars < 0, behind, ahead)


def shortened(names: Sequence[str]) -> list[str]:
    """Without the parts that all names begin with, "model.layers." for most."""
    split = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    return [".".join(parts[common:]) for parts in split]


def _heat(
    axes: Axes, values: ArrayLike, columns: Sequence[str], rows: Sequence[str], limits: tuple[float, float | None],
    *, colours: str = "cividis", numbers: bool = False, labelled: bool = True, bar: bool = True,
) -> None:  # fmt: skip
    """A matrix in colours; cells of NaN stay pale. A white line stands between blocks."""
    table = np.asarray(values, np.float64)
    axes.set_facecolor("#eceff2" if colours == "cividis" else "white")
    image = axes.imshow(table, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    is_tight = sum(map(len, columns)) > (12 if bar and not numbers else 40)
    angle = 40 if len(columns) <= FEW else 90
    turned: dict[str, Any] = {"rotation": angle, "ha": "right", "rotation_mode": "anchor"} if is_tight else {}
    if angle == 90:
        turned |= {"va": "center"}
    axes.set_xticks(np.arange(len(columns)), columns, fontsize=8, **turned)
    _some_ticks(axes.set_yticks, shortened(rows))
    axes.tick_params(labelleft=labelled)
    blocks = list(blocks_of(rows)) if any("." in row for row in rows) else []
    for place in (n for n in range(1, len(blocks)) if blocks[n] != blocks[n - 1]):
        axes.axhline(place - 0.5, color="white", lw=1.2)
    if numbers:
        _write_numbers(axes, image, table)
    elif bar:
        figure = axes.get_figure()
        assert figure is not None
        figure.colorbar(image, ax=axes, fraction=0.06, pad=0.03, aspect=30).outline.set_visible(False)


def _write_numbers(axes: Axes, image: AxesImage, table: Wide) -> None:
    """Each cell's value in ink that can be read on its colour."""
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            red, green, blue, _ = image.to_rgba(np.array(value))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=ink)


def _some_ticks(set_ticks: Callable[..., object], labels: Sequence[str]) -> None:
    """At most about 40 labels."""
    step = -(-len(labels) // 40) or 1
    set_ticks(np.arange(0, len(labels), step), labels[::step], fontsize=8)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
