"""Static mode: one fixed mix folded into the base weights; the graph is the plain base model's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from exporter.adapters import Expert, Replacement
from exporter.checkpoints import Tying
from exporter.merges.merge import SiteMerge, measured, merged
from exporter.merges.update import Update, dense
from exporter.sites import Site, SiteKind, is_transposed
from exporter.store import Weight, WeightStore
from runtime.manifest import MergeInfo, MixInfo
from runtime.mix_file import scalings_from_file

Values = Callable[[str], torch.Tensor]  # of a parameter, by its name


def mix_rows(mix: MixInfo, experts: Sequence[str], sites: Sequence[str]) -> torch.Tensor:
    """[sites, E]: the mix's row of every site, in the order of `sites`. Raises InputError for strangers."""
    return torch.from_numpy(scalings_from_file(mix, experts, sites)).expand(max(len(sites), 1), -1)


def folded_weight(base: torch.Tensor, site: Site, update: Update, row: torch.Tensor) -> torch.Tensor:
    """W' = W + the update in fp32, rounded once to W's dtype. Conv1D and Embedding store W transposed.

    A DoRA expert, alone with weight 1 in `row` (`require_foldable`), scales every output of that.
    An embedding's `embed_scale` needs no care: its forward multiplies the folded row, as PEFT multiplies the delta.
    """
    delta = dense(update)  # [out, in]
    is_turned = is_transposed(site.kind)
    weight = base.float() + (delta.T if is_turned else delta)
    if site.out_scale is not None and (scales := site.out_scale[row[list(site.doras)] != 0]).numel():
        [scale] = scales  # [out]
        weight = weight * (scale if is_turned else scale[:, None])
    return weight.to(base.dtype)


def folded_weights(
    model: nn.Module,
    sites: Iterable[Site],
    rows: torch.Tensor,  # [E], or [sites, E] by site index
    graph: str = "static",
    merge: MergeInfo | None = None,
    measures: dict[str, SiteMerge] | None = None,
    values: Values | None = None,
) -> dict[str, Weight]:
    """Parameter -> what stands in its place, computed when the store writes it, under the name <graph>/<parameter>.

    Measuring is part of folding, since a merge of a large module is dear: `measures` fills as the store writes.
    `values`: the base's, in fp32, where the model has none.
    """
    read = values or model.get_parameter

    def fold(base: torch.Tensor, site: Site) -> torch.Tensor:
        row = row_of(rows, site)
        update = merged(site, row, merge or MergeInfo())
        if measures is not None:
            measures[site.path] = measured(site, row, update)
        return folded_weight(base, site, update, row)

    def weight(name: str, site: Site) -> Weight:
        base = model.get_parameter(name)
        return Weight(f"{graph}/{name}", base.dtype, tuple(base.shape), lambda: fold(read(name), site).to(base.dtype))

    return {name: weight(name, site) for site in sites for name in [f"{site.path}.weight"]}


def row_of(rows: torch.Tensor, site: Site) -> torch.Tensor:
    """The mix [E] of one site."""
    return rows if rows.dim() == 1 else rows[site.index]


def touched_sites(sites: Iterable[Site], rows: torch.Tensor) -> list[Site]:
    """Those where the mix uses an expert that has columns there."""
    return [site for site in sites if (row_of(rows, site) @ site.weights).any()]


def replacements_of(
    experts: Sequence[Expert], mix: Mapping[str, float], tying: Tying | None = None
) -> dict[str, Replacement]:
    """The weights of the base that the mix's only expert replaces, by parameter name; tied rows under both names."""
    used = [expert for expert in experts if mix.get(expert.name)]
    new = {name: new for expert in used for name, new in expert.replacements.items()}
    return new if tying is None else tying.with_tied_rows(new)


def without_twin(new: Mapping[str, Replacement], tying: Tying | None) -> dict[str, Replacement]:
    """The same without the head where it stays one parameter with the embedding, since both get the same rows."""
    is_one = tying is not None and tying.by_loader and tying.head in new and not tying.parted(new)
    return {name: value for name, value in new.items() if not (is_one and tying is not None and name == tying.head)}


def replaced_weights(
    model: nn.Module, replacements: Mapping[str, Replacement], graph: str, values: Values | None = None
) -> dict[str, Weight]:
    """Parameter -> the weight that replaces it; `values` as in `folded_weights`."""
    read = values or model.get_parameter

    def weight(name: str, new: Replacement) -> Weight:
        base = model.get_parameter(name)
        return Weight(
            f"{graph}/{name}", base.dtype, tuple(base.shape), lambda: replaced_weight(read(name), new).to(base.dtype)
        )

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

    So does an end that is `replaced` otherwise than the other (`Tying.parted`).

    Yields head parameter -> embedding parameter where that was needed, else nothing.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:  # an encoder
        yield {}
        return
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
