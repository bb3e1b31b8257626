"""Routers inside the sites: for each token, from the site's own input, the share of every rank column.

Everything here is computed in float32, as the gate is. An expert that lacks a site has no columns there and takes no
part in its choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from exporter.merges.rank_select import kept_of
from exporter.merges.svd import terms_of
from exporter.merges.update import LowRank
from exporter.sites import Site
from runtime.routers import ArrowInfo, RankSelectInfo, RouterInfo

ITERATIONS, EPSILON = 15, 1e-8  # of PEFT's ArrowLoraLinearLayer.top_right_singular_vec_from_BA
MASKED = torch.finfo(torch.float32).min  # finite, as in the gate


class ArrowRouter(nn.Module):
    """Arrow (Ostapenko et al. 2024, arXiv 2405.11157): softmax over the k experts nearest to x, of a group's sites.

    Nearness is |x . prototype|, the prototype of an expert the direction that its update b a stretches most.
    """

    def __init__(self, group: Sequence[Site], info: ArrowInfo) -> None:
        super().__init__()
        self.top_k, self.temperature = info.top_k, info.temperature
        found = [prototypes(site, info.seed) for site in group]
        self.experts = [len(vectors) for vectors, _ in found]  # that compete at each site
        starts = accumulate(self.experts, initial=0)
        owners = torch.cat([owner + start for start, (_, owner) in zip(starts, found, strict=False)])
        self.prototypes = nn.Parameter(torch.cat([vectors for vectors, _ in found]), requires_grad=False)
        self.owners = nn.Parameter(owners, requires_grad=False)  # [sum of R]: each column's prototype

    def forward(self, x: torch.Tensor, product: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """x [B, S, in] -> [B, S, sum of R]."""
        nearness = F.linear(x.float(), self.prototypes).abs()
        parts = [self.shares(part) for part in nearness.split(self.experts, dim=-1)]
        return torch.cat(parts, dim=-1).index_select(2, self.owners)

    def shares(self, nearness: torch.Tensor) -> torch.Tensor:
        """[B, S, experts of a site]: the softmax over the top k; of equals the first are taken."""
        scores = nearness / self.temperature
        if self.top_k < nearness.shape[-1]:
            chosen = torch.topk(nearness, self.top_k, dim=-1).indices  # [B, S, k]
            kept = (chosen.unsqueeze(-1) == torch.arange(nearness.shape[-1])).any(dim=-2)  # no ScatterElements
            scores = torch.where(kept, scores, torch.full_like(scores, MASKED))
        return torch.softmax(scores, dim=-1)


class RankSelectRouter(nn.Module):
    """The rank-one terms that change a site's output most for this token; the others get 0.

    Sites come from `in_rank_one_terms`: |product * factors| is the length of what each column adds, s_e d_i (v_i . x).
    """

    def __init__(self, group: Sequence[Site], info: RankSelectInfo) -> None:
        super().__init__()
        self.ranks = [site.a.shape[0] for site in group]
        self.kept = [kept_of(rank, info.keep) for rank in self.ranks]

    def forward(self, x: torch.Tensor, product: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """product, factors [B, S, sum of R] -> 1 or 0 for each column."""
        strengths = (product.float() * factors).abs().split(self.ranks, dim=-1)
        return torch.cat([strongest(part, count) for part, count in zip(strengths, self.kept, strict=True)], dim=-1)


def strongest(strength: torch.Tensor, count: int) -> torch.Tensor:
    """1 for the `count` largest of the last axis, else 0; all that equal the last of them are kept, too.

    A threshold, since which of equals TopK takes is open on some engines.
    """
    if count >= strength.shape[-1]:
        return torch.ones_like(strength)
    least = torch.topk(strength, count, dim=-1).values[..., -1:]
    return (strength >= least).to(strength.dtype)


def make_router(group: Sequence[Site], info: RouterInfo | None) -> nn.Module | None:
    """The router of sites that read one tensor."""
    if info is None:
        return None
    return ArrowRouter(group, info) if info.kind == "arrow" else RankSelectRouter(group, info)


def routable_sites(sites: Sequence[Site], info: RouterInfo | None) -> Sequence[Site]:
    """The sites in the form that the router reads."""
    is_rank_select = info is not None and info.kind == "rank-select"
    return [in_rank_one_terms(site) for site in sites] if is_rank_select else sites


def in_rank_one_terms(site: Site) -> Site:
    """The same update with every expert's scale * b a as its singular value decomposition: a holds v, b u, weights d.

    With entries of the size of a unit vector's, neither a nor b loses digits in float16.
    """
    experts, factors = experts_of(site), site.weights.sum(0).double()  # [R]: a column belongs to one expert
    b = site.b.double() * factors
    parts = [terms_of(LowRank(site.a[columns].double(), b[:, columns])) for _, columns in experts]
    ranks = tuple(len(part.strength) for part in parts)
    weights = torch.zeros(len(site.weights), sum(ranks))
    starts = accumulate(ranks, initial=0)
    for (row, _), part, start, rank in zip(experts, parts, starts, ranks, strict=False):
        weights[row, start : start + rank] = part.strength.float()
    v, u = torch.cat([part.v for part in parts]), torch.cat([part.u for part in parts], dim=1)
    return replace(site, a=v.float(), b=u.float(), weights=weights, ranks=ranks)


def experts_of(site: Site) -> list[tuple[int, slice]]:
    """(column among all E, rank columns) of every expert that adapts this module, in order."""
    starts = accumulate(site.ranks, initial=0)
    spans = [slice(start, start + rank) for start, rank in zip(starts, site.ranks, strict=False)]
    return [(int(site.weights[:, span.start].abs().argmax()), span) for span in spans]


def prototypes(site: Site, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A prototype for each expert with columns here [n, in], and for each rank column the number of its own [R]."""
    found = [prototype(site.a[columns], site.b[:, columns], seed) for _, columns in experts_of(site)]
    owners = [torch.full((columns.stop - columns.start,), n) for n, (_, columns) in enumerate(experts_of(site))]
    return torch.stack(found), torch.cat(owners)


def prototype(a: torch.Tensor, b: torch.Tensor, seed: int) -> torch.Tensor:
    """[in]: the right singular vector of b a with the largest singular value, by power iterations in float64.

    They begin at PEFT's random vector and stop where PEFT stops, converged or not: parity needs the same vector.
    """
    v = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    a, b = a.double(), b.double()
    square = b.T @ b  # [r, r]
    v = v / (v.norm() + EPSILON)
    for _ in range(ITERATIONS):
        w = a.T @ (square @ (a @ v))
        v = w / (w.norm() + EPSILON)
    return v.float()
