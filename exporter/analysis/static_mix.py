"""Whether a static mix can stand in for the gate: the data's mean scalings, and what is to be kept for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.analysis.report import Choice, Recommendation, Thresholds, VariantScore
from runtime.manifest import AdapterKind, Manifest, MixInfo
from runtime.mix import BASE
from runtime.mix_file import MixFile

Wide = NDArray[np.float64]
GATE, MEAN, MEAN_BY_SITE, UNIFORM = "gate", "mean mix", "mean mix by site", "uniform mix"
EXPERT = "expert "  # before an expert's name
THRESHOLDS = Thresholds(divergence=0.01, agreement=0.99, perplexity_ratio=1.01)


def mean_mixes(mean: Wide, experts: Sequence[str], paths: Sequence[str]) -> dict[str, MixFile]:
    """Mean scalings [G, E] as mixes: one for all sites, and with G > 1 one row a site."""
    mixes = {MEAN: MixFile(weights=_weights(mean.mean(0), experts))}
    if len(mean) > 1:
        sites = {path: _weights(row, experts) for path, row in zip(paths, mean, strict=True)}
        mixes[MEAN_BY_SITE] = MixFile(sites=sites)
    return mixes


def plain_mixes(manifest: Manifest) -> dict[str, MixFile]:
    """The base, each expert alone, and all in equal parts where no gate says better and none refuses to be mixed."""
    mixes = {BASE: MixFile()} | {f"{EXPERT}{one.name}": MixFile(weights={one.name: 1.0}) for one in manifest.experts}
    is_linear = all(expert.kind is not AdapterKind.DORA for expert in manifest.experts)
    if manifest.gate is None and is_linear and len(manifest.experts) > 1:
        mixes[UNIFORM] = MixFile(weights={expert.name: 1 / len(manifest.experts) for expert in manifest.experts})
    return mixes


def recommend(scores: Sequence[VariantScore], mixes: Mapping[str, MixInfo]) -> tuple[Choice, str, str]:
    """Static or dynamic, the mix to write, and the reason. The first score is the reference's."""
    own, *others = scores
    if own.name == BASE:
        return (Choice.STATIC, *best_of(own, others))
    static = [score for score in others if score.name in (MEAN, MEAN_BY_SITE)]
    if own.name != GATE:  # what a router inside the sites says has no mean here: all there is, the nearest first
        static = sorted((score for score in others if score.name != BASE), key=lambda score: score.divergence)
    for score in static:
        if not failures(score, own):
            return (
                Choice.STATIC,
                score.name,
                f"The {score.name} keeps within every threshold ({measured(score, own)}).",
            )
    nearest, best = min(static, key=lambda score: score.divergence), min(others, key=lambda score: score.loss)
    reason = (
        f"No static mix tried comes near the {own.name}. The nearest, the {nearest.name}, fails on "
        f"{' and '.join(failures(nearest, own))} ({measured(nearest, own)})."
    )
    if best.loss < own.loss:
        reason += f" But {best.name} predicts these texts better than the {own.name}: perplexity {best.perplexity:.4g}."
    return Choice.DYNAMIC, nearest.name, reason


def best_of(base: VariantScore, others: Sequence[VariantScore]) -> tuple[str, str]:
    """The mix and the reason where nothing depends on the token."""
    best = min(others, key=lambda score: score.loss)
    reason = (
        "There is no gate: scalings never depend on the token, so a mix folded into the weights is the same "
        f"model at the base's cost. Of the mixes tried, {best.name} has the lowest perplexity, {best.perplexity:.4g}; "
        "learn-mix may find a better one."
    )
    if best.loss >= base.loss:
        reason += f" But the base alone has {base.perplexity:.4g}: none of them helps here."
    return best.name, reason


def failures(score: VariantScore, own: VariantScore) -> list[str]:
    """Which thresholds a mix breaks."""
    checks = {
        "divergence": score.divergence <= THRESHOLDS.divergence,
        "agreement": score.agreement >= THRESHOLDS.agreement,
        "perplexity": score.loss - own.loss <= float(np.log(THRESHOLDS.perplexity_ratio)),
    }
    return [name for name, is_kept in checks.items() if not is_kept]


def measured(score: VariantScore, own: VariantScore) -> str:
    """A mix's distance from the gate or router in words."""
    return (
        f"KL {score.divergence:.3g} nats, the same top token at {score.agreement:.1%} of positions, "
        f"perplexity {score.perplexity:.4g} against {own.perplexity:.4g}"
    )


def recommendation(
    choice: Choice, mix: str, reason: str, bundle: str, mix_file: str, *, is_gated: bool
) -> Recommendation:
    """With the commands; ADAPTERS stands for what the bundle was built from, which it does not know."""
    mix_file = shlex.quote(mix_file)
    generate = f'python -m runtime generate {shlex.quote(bundle)} --prompt "..."'
    fold = f"python -m exporter build --adapters ADAPTERS --mode static --mix {mix_file} --out STATIC_BUNDLE"
    commands = (
        (f"{generate} --mix {mix_file}", fold)
        if choice is Choice.STATIC
        else (generate, f"{generate} --mix {mix_file}")
    )
    return Recommendation(
        choice=choice, mix=mix, reason=reason, thresholds=THRESHOLDS if is_gated else None, commands=commands
    )


def _weights(row: Wide, experts: Sequence[str]) -> dict[str, float]:
    return {name: float(f"{weight:.7g}") for name, weight in zip(experts, row, strict=True)}
