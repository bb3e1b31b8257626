"""`rank-select`: the strongest rank-one terms of all experts of a site, whoever they come from."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from exporter.merges.experts import weighted_experts
from exporter.merges.svd import Terms, factors_of, terms_of
from exporter.merges.update import LowRank
from exporter.sites import Site
from runtime.manifest import MergeInfo

KEEP = 0.5


def rank_select(site: Site, row: torch.Tensor, merge: MergeInfo) -> LowRank:
    """Each expert's own terms in one pool; its weight in the mix is part of their strength."""
    parts = [terms_of(expert) for expert in weighted_experts(site, row).values()]
    pool = Terms(
        torch.cat([part.u for part in parts], dim=1),
        torch.cat([part.strength for part in parts]),
        torch.cat([part.v for part in parts]),
    )
    order = pool.strength.argsort(descending=True, stable=True)
    kept = order[: kept_of(len(order), merge.keep or KEEP)]
    return factors_of(Terms(pool.u[:, kept], pool.strength[kept], pool.v[kept]))


def kept_of(terms: int, keep: float) -> int:
    """How many of a site's terms stay: the share as it is written, rounded up. In floats 0.1 of 30 is more than 3."""
    return math.ceil(Fraction(str(keep)) * terms)
