"""Gated modules: base modules plus the gated low-rank update of their site, ready to be traced."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from exporter.plugin_nodes import gated_low_rank
from exporter.sites import Site, SiteKind
from runtime.site_groups import joined_path


@dataclass(slots=True)
class StepState:
    """What gated modules and the head read and leave during one forward of the traced model."""

    columns: Sequence[torch.Tensor] = ()  # per group [B, S, R]: the factor of every rank column; then DoRA's scalings
    logit_index: torch.Tensor | None = None  # [B, K]
    hidden: torch.Tensor | None = None  # [B, S, H] after the final norm
    is_routed: torch.Tensor | None = None  # [B, 1, 1]: rows whose rank columns the sites' routers weigh
    adapters: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by name, where they are inputs (hot_sites)
    down: dict[int, tuple[torch.Tensor, Sequence[torch.Tensor]]] = field(default_factory=dict)  # per group: x, parts


class Columns(nn.Module):
    """scalings [B, S, G, E] -> the factors s . weights of every rank column, of all groups in one lookup.

    A column belongs to one expert, so weights [E, R] has one entry a column: its place `index` and its value `scale`.
    After the groups come the sites with DoRA: the plain scalings of their DoRA experts, [B, S, D] each.
    """

    def __init__(self, groups: Sequence[Sequence[Site]], experts: int, *, shared: bool) -> None:
        super().__init__()
        sites = [site for group in groups for site in group]
        switched = [site for site in sites if site.doras]
        columns = [(site, site.weights.abs().argmax(0), site.weights.sum(0)) for site in sites]
        columns += [(site, torch.tensor(site.doras), torch.ones(len(site.doras))) for site in switched]
        index = [column + (0 if shared else site.index * experts) for site, column, _ in columns]
        self.index = nn.Parameter(torch.cat(index), requires_grad=False)
        self.scale = nn.Parameter(torch.cat([scale for _, _, scale in columns]), requires_grad=False)
        self.sizes = [sum(site.weights.shape[1] for site in group) for group in groups]
        self.sizes += [len(site.doras) for site in switched]

    def forward(self, scalings: torch.Tensor) -> Sequence[torch.Tensor]:
        factors = scalings.flatten(2).index_select(2, self.index) * self.scale  # [B, S, sum of sizes]
        return factors.split(self.sizes, dim=-1)


class Down(nn.Module):
    """x -> (x aT) * (s . weights) for all sites of a group, which read one tensor: one product for q, k and v.

    Small products do not keep two cores busy: on a CPU three of [in, 64] take twice as long as one of [in, 192].
    """

    def __init__(
        self,
        group: Sequence[Site],
        number: int,
        state: StepState,
        dtype: torch.dtype,
        router: nn.Module | None = None,  # x, product, factors -> the share of every rank column, float32
    ) -> None:
        super().__init__()
        self.router = router
        self.path = joined_path([site.path for site in group])
        self.number = number
        self.state = state
        self.ranks = [site.a.shape[0] for site in group]
        self.lora_a = nn.Parameter(torch.cat([site.a for site in group]).to(dtype), requires_grad=False)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x aT, [B, S, sum of R]."""
        return F.linear(x, self.lora_a)

    def factors(self) -> torch.Tensor:
        """The factor of every rank column of the group: s . weights, [B, S, sum of R]."""
        return self.state.columns[self.number]

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """The product under its factors; in routed rows also under the router's shares."""
        product, factors = self.product(x), self.factors()
        if self.router is not None:
            assert self.state.is_routed is not None
            shares = self.router(tokens_of(x, factors), tokens_of(product, factors), factors)
            factors = factors * torch.where(self.state.is_routed, shares, 1.0)
        return product * rows_of(factors, product).to(product.dtype)

    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """One [B, S, R] a site; the group's first site computes, the others find the result."""
        seen, parts = self.state.down.get(self.number, (None, ()))
        if seen is not x:
            gated = self.gated(x)
            parts = gated.split(self.ranks, dim=-1) if len(self.ranks) > 1 else (gated,)
            self.state.down[self.number] = x, parts
        return parts


class EmbeddingDown(Down):
    """Token lookup in a, kept as [vocab, R]."""

    def __init__(
        self,
        group: Sequence[Site],
        number: int,
        state: StepState,
        dtype: torch.dtype,
        router: nn.Module | None = None,
    ) -> None:
        super().__init__(group, number, state, dtype, router)
        self.lora_a = nn.Parameter(self.lora_a.T.contiguous(), requires_grad=False)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, self.lora_a)


class HeadDown(Down):
    """An adapted lm_head sees only the picked positions, so its factors are picked too."""

    def factors(self) -> torch.Tensor:
        assert self.state.logit_index is not None
        return pick(super().factors(), self.state.logit_index)


class FirstTokenDown(Down):
    """An encoder's pooler and head see only the first token [B, in], so its factors [B, R] are theirs."""

    def factors(self) -> torch.Tensor:
        return super().factors()[:, 0]


class GatedModule(nn.Module):
    """A base module plus the gated low-rank update of its site: y = W x + ((x aT) * (s . weights)) bT."""

    def __init__(self, base: nn.Module, site: Site, down: Down, place: int) -> None:
        super().__init__()
        self.base = base
        self.path = site.path
        self.down = down
        self.place = place  # in the group
        self.lora_b = nn.Parameter(site.b.to(next(base.parameters()).dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = F.linear(self.down(x)[self.place], self.lora_b)
        scale = getattr(self.base, "embed_scale", None)  # scaled embeddings scale the update too (PEFT lora.Embedding)
        return self.base(x) + (delta if scale is None else delta * scale.to(delta.dtype))


class JoinedModule(GatedModule):
    """The same in one product, y = [x, gated] [W; bT]: engines join the two constants once, when they load.

    On a CPU a product of its own for b takes twice the time that its bytes cost here, and an Add comes after it.
    """

    base: nn.Linear | Conv1D

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.base.weight if isinstance(self.base, Conv1D) else self.base.weight.T  # [in, out]
        y = torch.cat([x, self.down(x)[self.place]], -1) @ torch.cat([weight, self.lora_b.T])
        return y if self.base.bias is None else y + self.base.bias


class PluginModule(GatedModule):
    """The same as W x and one node that adds the update; b lies as [R, out], as the node reads it."""

    def __init__(self, base: nn.Module, site: Site, down: Down, place: int) -> None:
        super().__init__(base, site, down, place)
        self.lora_b = nn.Parameter(self.lora_b.T.contiguous(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, factors = self.base(x), self.down.factors()
        if x.dim() == factors.dim():
            return gated_low_rank(y, x, self.down.lora_a, self.lora_b, factors)
        # The node takes [B, S, .] only: all tokens become one row of it.
        y, x, factors = (value.flatten(end_dim=-2)[None] for value in (y, x, factors))
        return gated_low_rank(y, x, self.down.lora_a, self.lora_b, factors)[0]


class DoraModule(nn.Module):
    """A gated module whose output, but for the bias, a DoRA expert rescales: y + (y - bias) * (s . (out_scale - 1)).

    With s one-hot that is out_scale * (W x + update) + bias; rows of other experts and of the base stay bit for bit.
    """

    def __init__(self, gated: GatedModule, site: Site, number: int, state: StepState) -> None:
        super().__init__()
        assert site.out_scale is not None
        self.gated = gated
        self.path = site.path
        self.is_picked = site.kind is SiteKind.LM_HEAD
        self.is_first = site.kind is SiteKind.FIRST_TOKEN
        self.number = number  # among state.columns
        self.state = state
        self.out_shift = nn.Parameter((site.out_scale - 1).to(gated.lora_b.dtype), requires_grad=False)  # [D, out]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gated(x)
        bias = getattr(self.gated.base, "bias", None)
        return y + (y if bias is None else y - bias) * (rows_of(self.scalings(), y).to(y.dtype) @ self.out_shift)

    def scalings(self) -> torch.Tensor:
        """Those of the site's DoRA experts [B, S, D], at the picked positions for lm_head."""
        scalings = self.state.columns[self.number]
        if self.is_first:
            return scalings[:, 0]
        if not self.is_picked:
            return scalings
        assert self.state.logit_index is not None
        return pick(scalings, self.state.logit_index)


PLAIN_PRODUCTS = (nn.Linear.forward, Conv1D.forward)  # a subclass may do more than W x + bias
DOWN: Mapping[SiteKind, type[Down]] = {
    SiteKind.LINEAR: Down,
    SiteKind.CONV1D: Down,
    SiteKind.EMBEDDING: EmbeddingDown,
    SiteKind.LM_HEAD: HeadDown,
    SiteKind.FIRST_TOKEN: FirstTokenDown,
}


def gated_modules(
    bases: Mapping[str, nn.Module],
    groups: Sequence[Sequence[Site]],
    state: StepState,
    *,
    with_plugin: bool = False,
    routers: Sequence[nn.Module | None] = (),  # of each group; none: no group has one
    apart: Collection[
        str
    ] = (),  # paths whose W stays in a product of its own: quantised ones, and those kept as shards
) -> dict[str, GatedModule | DoraModule]:
    """Path -> the module that stands in for the base module there; with a plugin every group is of one site.

    W and b are joined into one product unless kept apart, which makes a copy of W wherever the graph is loaded.
    """
    modules: dict[str, GatedModule | DoraModule] = {}
    switched = [site.path for group in groups for site in group if site.doras]  # the order of Columns
    for number, group in enumerate(groups):
        dtype = next(bases[group[0].path].parameters()).dtype
        down = DOWN[group[0].kind](group, number, state, dtype, routers[number] if routers else None)
        for place, site in enumerate(group):
            base = bases[site.path]
            joins = type(base).forward in PLAIN_PRODUCTS and site.path not in apart
            gated = _gated_class(site, with_plugin=with_plugin, joins=joins)(base, site, down, place)
            modules[site.path] = gated
            if site.doras:
                modules[site.path] = DoraModule(gated, site, len(groups) + switched.index(site.path), state)
    return modules


def _gated_class(site: Site, *, with_plugin: bool, joins: bool) -> type[GatedModule]:
    if with_plugin and site.kind is not SiteKind.EMBEDDING:
        return PluginModule
    return JoinedModule if joins else GatedModule


def rows_of(factors: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Factors [B, S, R] for a module that sees its tokens as [B * S, .], as OPT's MLP does; else as they are."""
    return factors if factors.dim() == like.dim() else factors.flatten(end_dim=-2)


def tokens_of(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The other way round: what such a module sees, [B * S, .], as [B, S, .]; token ids [B, S] as they are."""
    return x if x.dim() == like.dim() or not x.is_floating_point() else x.unflatten(0, like.shape[:2])


def pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, S, D] at index [B, K] -> [B, K, D]."""
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
