"""Sites: adapted modules with the deltas of all experts stacked along the rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import nn

from exporter.adapters import AdapterSet, LoraDelta
from exporter.errors import ExportError


class SiteKind(StrEnum):
    """What the base module does with its input; decides where the low-rank product goes."""

    LINEAR = "linear"
    CONV1D = "conv1d"  # GPT-2's Linear with a transposed weight [in, out]
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"  # a Linear that sees only the picked positions
    FIRST_TOKEN = "first_token"  # a Linear of an encoder's head, that sees only the first token: [B, in]


@dataclass(frozen=True, slots=True)
class Site:
    """One adapted module; columns of different experts lie side by side, without padding.

    a [R, in] (embedding: [R, vocab]), b [out, R], weights [E, R] with weights[e, j] = scale_e (alpha/r or
    alpha/sqrt(r), times the global scaling weight) where rank column j belongs to expert e, else 0.
    dynamic y = W x + ((x aT) * (s . weights)) bT      static W' = W + (b * (s . weights)) a
    Where a DoRA expert is on, all of that (but no bias) times its row of out_scale [D, out] = m / |W + scale * b a|.
    """

    path: str
    kind: SiteKind
    index: int  # position among the sites = PEFT's layer_number
    a: torch.Tensor
    b: torch.Tensor
    weights: torch.Tensor
    experts: tuple[str, ...]  # those that have columns here, in column order
    ranks: tuple[int, ...]
    doras: tuple[int, ...] = ()  # columns of the DoRA experts among all E, in order
    out_scale: torch.Tensor | None = None  # None without DoRA


def stack(
    adapters: AdapterSet,
    module_kinds: Sequence[tuple[str, SiteKind]],
    model: nn.Module | None = None,
    values: Callable[[str], torch.Tensor] | None = None,
) -> tuple[Site, ...]:
    """Make the sites, in module-tree order of the union of the experts' targets (PEFT's `layer_number` order).

    DoRA needs the base in fp32: the `model`, or the `values` of a parameter by its name.
    """
    read = values or (None if model is None else model.get_parameter)
    factor = adapters.gate.global_scaling_weight if adapters.gate else 1.0
    touched = {path for expert in adapters.experts for path in expert.deltas}
    ordered = [(path, kind) for path, kind in module_kinds if path in touched]
    if missing := touched - {path for path, _ in ordered}:
        raise ExportError(
            "experts touch modules that the base model lacks",
            got=", ".join(sorted(missing)[:5]),
            fix="use the base model the experts were trained on",
        )
    return tuple(_stack_site(adapters, path, kind, i, factor, read) for i, (path, kind) in enumerate(ordered))


def _stack_site(
    adapters: AdapterSet,
    path: str,
    kind: SiteKind,
    index: int,
    factor: float,
    read: Callable[[str], torch.Tensor] | None,
) -> Site:
    parts = [
        (e, expert.name, expert.deltas[path]) for e, expert in enumerate(adapters.experts) if path in expert.deltas
    ]
    ranks = tuple(delta.a.shape[0] for _, _, delta in parts)
    weights = torch.zeros(len(adapters.experts), sum(ranks))
    start = 0
    for (e, _, delta), rank in zip(parts, ranks, strict=True):
        weights[e, start : start + rank] = delta.scale * factor
        start += rank
    doras = [(e, delta) for e, _, delta in parts if delta.magnitude is not None]
    out_scale = None
    if doras:
        assert read is not None
        base = read(f"{path}.weight")
        out_scale = torch.stack([_out_scale(path, base, kind, delta) for _, delta in doras])
    return Site(
        path,
        kind,
        index,
        torch.cat([delta.a.float() for _, _, delta in parts]),
        torch.cat([delta.b.float() for _, _, delta in parts], dim=1),
        weights,
        tuple(name for _, name, _ in parts),
        ranks,
        tuple(e for e, _ in doras),
        out_scale,
    )


def _out_scale(path: str, base: torch.Tensor, kind: SiteKind, delta: LoraDelta) -> torch.Tensor:
    """m / |W + scale * b a|, the norm over everything that makes one output; of an embedding over the vocabulary."""
    assert delta.magnitude is not None
    weight = base.float().T if is_transposed(kind) else base.float()  # [out, in]
    norm = torch.linalg.vector_norm(weight + delta.scale * (delta.b @ delta.a), dim=1)
    scale = delta.magnitude / norm
    if not torch.isfinite(scale).all():
        raise ExportError(
            f"DoRA divides by the norm of the changed weight, which is 0 in {path}",
            got=f"outputs {torch.nonzero(~torch.isfinite(scale)).flatten().tolist()[:8]}",
            fix="give the base the adapter was trained on",
            code="E_VALUE",
        )
    return scale


def is_transposed(kind: SiteKind) -> bool:
    """Whether the base stores the weight as [in, out]."""
    return kind in (SiteKind.CONV1D, SiteKind.EMBEDDING)
