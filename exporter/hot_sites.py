"""Hot modules: gated modules whose stacked adapters are inputs of the graph, so that a running session can change them.

Every site has all R rank columns (`runtime.adapter_inputs` has the layout); R is dynamic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from exporter.gated import StepState, pick, rows_of
from exporter.sites import Site, SiteKind
from runtime.adapter_inputs import LORA_INDEX, LORA_SCALE, a_name, b_name
from runtime.site_groups import joined_path


class HotColumns(nn.Module):
    """scalings [B, S, G, E] -> per group [B, S, k, R]: what each rank column of its k sites is multiplied by."""

    order: torch.Tensor

    def __init__(self, groups: Sequence[Sequence[Site]], state: StepState, *, shared: bool) -> None:
        super().__init__()
        self.state = state
        self.sizes = [len(group) for group in groups]
        order = [site.index for group in groups for site in group]
        self.is_reordered = not shared and order != sorted(order)  # one row a site comes in module-tree order
        self.register_buffer("order", torch.tensor(order))

    def forward(self, scalings: torch.Tensor) -> Sequence[torch.Tensor]:
        rows = scalings.index_select(2, self.order) if self.is_reordered else scalings
        columns = rows.index_select(3, self.state.adapters[LORA_INDEX])  # [B, S, G, R]
        return (columns * self.state.adapters[LORA_SCALE]).split(self.sizes, dim=2)


class HotDown(nn.Module):
    """x -> (x a) * (s . scale) for all sites of a group, which read one tensor: one product for q, k and v."""

    def __init__(self, group: Sequence[Site], number: int, state: StepState) -> None:
        super().__init__()
        self.name = a_name(joined_path([site.path for site in group]))
        self.number = number
        self.sites = len(group)
        self.state = state

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x a, [B, S, k * R]."""
        return x @ self.state.adapters[self.name].flatten(1)

    def factors(self) -> torch.Tensor:
        """[B, S, k, R]."""
        return self.state.columns[self.number]

    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """One [B, S, R] a site; the group's first site computes, the others find the result."""
        seen, parts = self.state.down.get(self.number, (None, ()))
        if seen is not x:
            product, factors = self.product(x), self.factors()
            if self.sites == 1:
                parts = (product * rows_of(factors.squeeze(2), product).to(product.dtype),)
            else:
                wide = product.reshape(*product.shape[:-1], self.sites, factors.shape[3])
                rows = factors if wide.dim() == 4 else factors.flatten(0, 1)  # OPT's MLP sees its tokens as [B * S, .]
                parts = (wide * rows.to(product.dtype)).unbind(-2)
            self.state.down[self.number] = x, parts
        return parts


class HotEmbeddingDown(HotDown):
    """Token lookup in a, [vocab, R]."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, self.state.adapters[self.name].flatten(1))


class HotHeadDown(HotDown):
    """An adapted lm_head sees only the picked positions, so its factors are picked too."""

    def factors(self) -> torch.Tensor:
        assert self.state.logit_index is not None
        return pick(super().factors().squeeze(2), self.state.logit_index).unsqueeze(2)


class HotModule(nn.Module):
    """A base module plus the gated low-rank update of its site: y = W x + ((x a) * (s . scale)) b."""

    def __init__(self, base: nn.Module, site: Site, down: HotDown, place: int) -> None:
        super().__init__()
        self.base = base
        self.name = b_name(site.path)
        self.down = down
        self.place = place  # in the group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = self.down(x)[self.place] @ self.down.state.adapters[self.name]
        scale = getattr(self.base, "embed_scale", None)  # scaled embeddings scale the update too (PEFT lora.Embedding)
        return self.base(x) + (delta if scale is None else delta * scale.to(delta.dtype))


DOWN: Mapping[SiteKind, type[HotDown]] = {
    SiteKind.LINEAR: HotDown,
    SiteKind.CONV1D: HotDown,
    SiteKind.EMBEDDING: HotEmbeddingDown,
    SiteKind.LM_HEAD: HotHeadDown,
}


def hot_modules(
    bases: Mapping[str, nn.Module], groups: Sequence[Sequence[Site]], state: StepState
) -> dict[str, HotModule]:
    """Path -> the module that stands in for the base module there."""
    modules = {}
    for number, group in enumerate(groups):
        down = DOWN[group[0].kind](group, number, state)
        for place, site in enumerate(group):
            modules[site.path] = HotModule(bases[site.path], site, down, place)
    return modules
