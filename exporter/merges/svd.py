"""`svd`: the best update of a given rank (Eckart and Young), through the QR of the factors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from exporter.merges.experts import weighted_experts, weighted_sum
from exporter.merges.update import LowRank, Update
from exporter.sites import Site
from runtime.manifest import MergeInfo


class Terms(NamedTuple):
    """Rank-one terms strength * u v, strongest first: u [out, r], strength [r], v [r, in]."""

    u: torch.Tensor
    strength: torch.Tensor
    v: torch.Tensor


def svd(site: Site, row: torch.Tensor, merge: MergeInfo) -> LowRank:
    """The exact sum cut to `rank`, else to the largest rank among the experts used (PEFT's default)."""
    most = max(expert.rank for expert in weighted_experts(site, row).values())
    return cut(weighted_sum(site, row), merge.rank or most)


def cut(update: Update, rank: int) -> LowRank:
    """The nearest update of at most this rank."""
    terms = terms_of(update)
    return factors_of(Terms(terms.u[:, :rank], terms.strength[:rank], terms.v[:rank]))


def terms_of(update: Update) -> Terms:
    """The singular value decomposition; of factors without ever making [out, in]."""
    if isinstance(update, torch.Tensor):
        return Terms(*torch.linalg.svd(update, full_matrices=False))
    q_b, r_b = torch.linalg.qr(update.b)
    q_a, r_a = torch.linalg.qr(update.a.T)
    u, strength, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Terms(q_b @ u, strength, v @ q_a.T)


def factors_of(terms: Terms) -> LowRank:
    """Half of each strength to either side, so that neither is large."""
    root = terms.strength.sqrt()
    return LowRank(root[:, None] * terms.v, terms.u * root)
