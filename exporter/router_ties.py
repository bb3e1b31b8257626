"""Ties of routers inside the sites: where the reference's own choice was so close that a graph may take the other.

A router keeps some terms or experts and drops the others. Where the last kept and the first dropped are all but equal,
the order of a sum decides, and both answers are the model's.
"""

from __future__ import annotations

import torch

from exporter.reference import ReferenceResult

TIE = 1e-4  # relative distance of the two
DEVIATION = 1e-4  # of logits, |d| / (1 + |ref|): far above the noise of fp32, below what another choice moves


def router_ties(result: ReferenceResult) -> tuple[int, ...]:
    """The positions at which the router chose between all but equals; none without a router."""
    return () if result.margin is None else tuple((result.margin < TIE).nonzero().flatten().tolist())


def before_tie(got: torch.Tensor, expected: ReferenceResult) -> int:
    """How many positions of logits [T, V] can be compared: all, or those before the router took another way at a tie.

    What follows such a position reads its K/V and is another text's.
    """
    if expected.margin is None:
        return len(got)
    reference = expected.logits.double()
    apart = ((got.double() - reference).abs() / (1 + reference.abs())).amax(-1)
    other_ways = (apart > DEVIATION) & (expected.margin < TIE)
    return int(other_ways.int().argmax()) if other_ways.any() else len(got)
