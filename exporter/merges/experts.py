"""The experts of one site under a mix: each as its own pair of factors."""

from __future__ import annotations

import torch

from exporter.merges.update import LowRank, joined
from exporter.sites import Site


def weighted_experts(site: Site, row: torch.Tensor) -> dict[str, LowRank]:
    """Name -> w_e scale_e b_e a_e of every expert that the mix [E] uses here, in column order."""
    factors = row.double() @ site.weights.double()  # [R]: a column belongs to one expert
    experts, start = {}, 0
    for name, rank in zip(site.experts, site.ranks, strict=True):
        columns = slice(start, start + rank)
        if factors[columns].any():
            experts[name] = LowRank(site.a[columns].double(), site.b[:, columns].double() * factors[columns])
        start += rank
    return experts


def weighted_sum(site: Site, row: torch.Tensor) -> LowRank:
    """What every method is measured against: the sum over experts of w_e scale_e b_e a_e."""
    return joined(list(weighted_experts(site, row).values()))
