"""Static mode: one fixed mix folded into the base weights; the graph is the plain base model's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from exporter.adapters import Expert, Replacement
from exporter.errors import ExportError
from exporter.sites import Site, SiteKind, is_transposed
from exporter.store import Weight, WeightStore


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


def folded_weight(base: torch.Tensor, site: Site, row: torch.Tensor) -> torch.Tensor:
    """W' = W + (b * (s . weights)) a in fp32, rounded once to W's dtype. Conv1D and Embedding store W transposed.

    A DoRA expert, alone with weight 1 (`require_foldable`), scales every output of that.
    An embedding's `embed_scale` needs no care: its forward multiplies the folded row, as PEFT multiplies the delta.
    """
    delta = (site.b * (row @ site.weights)) @ site.a  # [out, in]
    is_turned = is_transposed(site.kind)
    weight = base.float() + (delta.T if is_turned else delta)
    if site.out_scale is not None and (scales := site.out_scale[row[list(site.doras)] != 0]).numel():
        [scale] = scales  # [out]
        weight = weight * (scale if is_turned else scale[:, None])
    return weight.to(base.dtype)


def folded_weights(
    model: nn.Module, sites: Iterable[Site], row: torch.Tensor, graph: str = "static"
) -> dict[str, Weight]:
    """Parameter -> what stands in its place, computed when the store writes it, under the name <graph>/<parameter>."""

    def weight(name: str, site: Site) -> Weight:
        base = model.get_parameter(name)
        return Weight(f"{graph}/{name}", base.dtype, tuple(base.shape), lambda: folded_weight(base, site, row))

    return {name: weight(name, site) for site in sites for name in [f"{site.path}.weight"]}


def replacements_of(experts: Sequence[Expert], row: torch.Tensor) -> dict[str, Replacement]:
    """The weights of the base that the mix's only expert replaces, by parameter name."""
    used = [expert for expert, weight in zip(experts, row, strict=True) if weight]
    return {name: new for expert in used for name, new in expert.replacements.items()}


def replaced_weights(model: nn.Module, replacements: Mapping[str, Replacement], graph: str) -> dict[str, Weight]:
    """Parameter -> the weight that replaces it."""

    def weight(name: str, new: Replacement) -> Weight:
        base = model.get_parameter(name)
        return Weight(f"{graph}/{name}", base.dtype, tuple(base.shape), lambda: replaced_weight(base, new))

    return {name: weight(name, new) for name, new in replacements.items()}


def replaced_weight(base: torch.Tensor, new: Replacement) -> torch.Tensor:
    """All of the weight, or its rows, with new values."""
    values = new.values.to(base.dtype)
    return values if new.rows is None else base.index_copy(0, torch.tensor(new.rows), values)


def rounded_weights(folded: WeightStore, dtype: torch.dtype, graph: str = "static") -> dict[str, Weight]:
    """The changed weights of an fp32 build, rounded once to `dtype`; folding rounded weights would round twice."""
    prefix = f"{graph}/"
    return {weight.name.removeprefix(prefix): rounded(weight, dtype) for weight in folded.weights(prefix)}


def rounded(weight: Weight, dtype: torch.dtype) -> Weight:
    """The same weight in another dtype."""
    return replace(weight, dtype=dtype, load=lambda: weight.load().to(dtype))


@contextmanager
def untied(model: PreTrainedModel, sites: Iterable[Site], replaced: Collection[str] = ()) -> Iterator[dict[str, str]]:
    """Give the head a parameter of its own (same memory) when an adapted site shares it with the embedding.

    So does a parameter of the two that is `replaced` as a whole; new rows are the head's too, as in PEFT.

    Yields head parameter -> embedding parameter where that was needed, else nothing.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    shared = head.weight
    partners: dict[str, str] = {}
    names = {id(module): name for name, module in model.named_modules()}
    is_replaced = any(f"{names[id(end)]}.weight" in replaced for end in (head, embedding))
    if tied and (is_replaced or any(site.kind in (SiteKind.EMBEDDING, SiteKind.LM_HEAD) for site in sites)):
        head.weight = nn.Parameter(shared.detach(), requires_grad=False)
        partners[f"{names[id(head)]}.weight"] = f"{names[id(embedding)]}.weight"
    try:
        yield partners
    finally:
        head.weight = shared
