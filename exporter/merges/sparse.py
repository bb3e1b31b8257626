"""`magnitude_prune`, `ties`, `dare_linear`, `dare_ties`: each expert's dense delta made sparse, then joined.

Deltas are made anew for every pass over the experts, so that three matrices are in memory whatever their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch

from exporter.merges.experts import weighted_experts
from exporter.merges.update import dense
from exporter.sites import Site
from runtime.manifest import MergeInfo

Sparsify = Callable[[Site, torch.Tensor, MergeInfo], Iterator[torch.Tensor]]


def magnitude_prune(site: Site, row: torch.Tensor, merge: MergeInfo) -> torch.Tensor:
    """The sum of the experts' largest entries."""
    return total(largest(site, row, merge))


def ties(site: Site, row: torch.Tensor, merge: MergeInfo) -> torch.Tensor:
    """TIES-Merging: trim to the largest entries, elect a sign for each, average the experts that have it."""
    return disjoint_mean(lambda: largest(site, row, merge))


def dare_linear(site: Site, row: torch.Tensor, merge: MergeInfo) -> torch.Tensor:
    """DARE: the sum of randomly thinned deltas, rescaled so that its expectation is the exact sum."""
    return total(thinned(site, row, merge))


def dare_ties(site: Site, row: torch.Tensor, merge: MergeInfo) -> torch.Tensor:
    """TIES-Merging of randomly thinned deltas."""
    return disjoint_mean(lambda: thinned(site, row, merge))


def largest(site: Site, row: torch.Tensor, merge: MergeInfo) -> Iterator[torch.Tensor]:
    """Each expert's delta with all but the share `density` of its entries, by magnitude, set to 0."""
    assert merge.density is not None
    for expert in weighted_experts(site, row).values():
        delta = dense(expert, torch.float64)
        size = delta.abs()
        kept = max(int(merge.density * delta.numel()), 1)
        threshold = size.flatten().kthvalue(delta.numel() - kept + 1).values
        yield delta.masked_fill_(size < threshold, 0.0)


def thinned(site: Site, row: torch.Tensor, merge: MergeInfo) -> Iterator[torch.Tensor]:
    """Each expert's delta, every entry kept with probability `density` and divided by it."""
    assert merge.density is not None
    for name, expert in weighted_experts(site, row).items():
        delta = dense(expert, torch.float64)
        dropped = draw(merge.seed or 0, site.path, name, delta.shape) >= merge.density
        yield delta.masked_fill_(dropped, 0.0).div_(merge.density)


def draw(seed: int, path: str, name: str, shape: torch.Size) -> torch.Tensor:
    """Uniform numbers of one expert at one module: their own stream, so that no other expert or module shifts them."""
    digest = hashlib.sha256(f"{seed}/{path}/{name}".encode()).digest()
    return torch.rand(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


def total(deltas: Iterator[torch.Tensor]) -> torch.Tensor:
    """Their sum."""
    result = next(deltas)
    for delta in deltas:
        result += delta
    return result


def disjoint_mean(deltas: Callable[[], Iterator[torch.Tensor]]) -> torch.Tensor:
    """Entry by entry the mean of the deltas that have the sign of their sum; those that are 0 there do not count."""
    elected = total(deltas()).sign_()
    result, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta in deltas():
        agrees = delta.sign() * elected > 0
        result += delta.masked_fill_(~agrees, 0.0)
        count += agrees
    return result / count.clamp_(min=1)
