"""Static mode: one fixed mix folded into the base weights; the graph is the plain base model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from exporter.errors import ExportError
from exporter.merges.merge import SiteMerge, measured, merged
from exporter.merges.update import Update, dense
from exporter.sites import Site, SiteKind
from exporter.store import Weight, WeightStore
from runtime.manifest import MergeInfo
from runtime.mix_file import MixFile

PREFIX = "static/"  # of the stored names of changed weights


def mix_row(mix: Mapping[str, float], experts: Sequence[str]) -> torch.Tensor:
    """The mix as scalings [E]; experts it does not name get 0."""
    if unknown := sorted(set(mix) - set(experts)):
        raise ExportError(
            "the mix names experts that do not exist",
            where="--mix",
            got=", ".join(unknown),
            need=f"some of {', '.join(experts)}",
        )
    row = torch.tensor([float(mix.get(name, 0.0)) for name in experts])
    if not torch.isfinite(row).all():
        raise ExportError("the mix has a weight that is not finite", where="--mix", got=str(dict(mix)))
    return row


def mix_rows(mix: MixFile, experts: Sequence[str], sites: Sequence[str]) -> torch.Tensor:
    """[sites, E]: the mix's row of every site, in the order of `sites`."""
    everywhere = mix_row(mix.weights, experts)
    if unknown := sorted(set(mix.sites) - set(sites)):
        raise ExportError(
            "the mix has weights for modules that no expert adapts",
            where="--mix",
            got=", ".join(unknown[:5]),
            need=f"some of the {len(sites)} adapted modules, such as {', '.join(list(sites)[:3])}",
        )
    rows = {path: mix_row(weights, experts) for path, weights in mix.sites.items()}
    return torch.stack([rows.get(path, everywhere) for path in sites]) if sites else everywhere[None]


def folded_weight(base: torch.Tensor, site: Site, update: Update) -> torch.Tensor:
    """W' = W + the update in fp32, rounded once to W's dtype. Conv1D and Embedding store W transposed.

    An embedding's `embed_scale` needs no care: its forward multiplies the folded row, as PEFT multiplies the delta.
    """
    delta = dense(update)
    if site.kind in (SiteKind.CONV1D, SiteKind.EMBEDDING):
        delta = delta.T
    return (base.float() + delta).to(base.dtype)


def folded_weights(
    model: nn.Module,
    sites: Iterable[Site],
    rows: torch.Tensor,  # [E], or [sites, E] by site index
    merge: MergeInfo | None = None,
    measures: dict[str, SiteMerge] | None = None,
) -> dict[str, Weight]:
    """Parameter -> what stands in its place, computed when the store writes it, under the name static/<parameter>.

    Measuring is part of folding, since a merge of a large module is dear: `measures` fills as the store writes.
    """

    def fold(base: torch.Tensor, site: Site) -> torch.Tensor:
        row = row_of(rows, site)
        update = merged(site, row, merge or MergeInfo())
        if measures is not None:
            measures[site.path] = measured(site, row, update)
        return folded_weight(base, site, update)

    def weight(name: str, site: Site) -> Weight:
        base = model.get_parameter(name)
        return Weight(f"{PREFIX}{name}", base.dtype, tuple(base.shape), lambda: fold(base, site))

    return {name: weight(name, site) for site in sites for name in [f"{site.path}.weight"]}


def row_of(rows: torch.Tensor, site: Site) -> torch.Tensor:
    """The mix [E] of one site."""
    return rows if rows.dim() == 1 else rows[site.index]


def touched_sites(sites: Iterable[Site], rows: torch.Tensor) -> list[Site]:
    """Those where the mix uses an expert that has columns there."""
    return [site for site in sites if (row_of(rows, site) @ site.weights).any()]


def rounded_weights(folded: WeightStore, dtype: torch.dtype) -> dict[str, Weight]:
    """The changed weights of an fp32 build, rounded once to `dtype`; folding rounded weights would round twice."""
    return {weight.name.removeprefix(PREFIX): rounded(weight, dtype) for weight in folded.weights(PREFIX)}


def rounded(weight: Weight, dtype: torch.dtype) -> Weight:
    """The same weight in another dtype."""
    return replace(weight, dtype=dtype, load=lambda: weight.load().to(dtype))


@contextmanager
def untied(model: PreTrainedModel, sites: Iterable[Site]) -> Iterator[dict[str, str]]:
    """Give the head a parameter of its own (same memory) when an adapted site shares it with the embedding.

    Yields head parameter -> embedding parameter where that was needed, else nothing.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    shared = head.weight
    partners: dict[str, str] = {}
    if tied and any(site.kind in (SiteKind.EMBEDDING, SiteKind.LM_HEAD) for site in sites):
        head.weight = nn.Parameter(shared.detach(), requires_grad=False)
        names = {id(module): name for name, module in model.named_modules()}
        partners[f"{names[id(head)]}.weight"] = f"{names[id(embedding)]}.weight"
    try:
        yield partners
    finally:
        head.weight = shared
