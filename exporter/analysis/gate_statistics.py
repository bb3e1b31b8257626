"""What the gate says, counted position by position: mass, deviation, top-1 share and entropy per site and expert."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.analysis.report import GateRow, GateStatistics
from exporter.mixture import blocks_of

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]


class GateTally:
    """Sums over positions, for G sites and E experts; nothing of a text is kept."""

    def __init__(self, sites: int, experts: int) -> None:
        self.positions = 0
        self.total: Wide = np.zeros((sites, experts))
        self.squares: Wide = np.zeros((sites, experts))
        self.tops: Wide = np.zeros((sites, experts))
        self.entropy: Wide = np.zeros(sites)

    def see(self, gate: Floats) -> None:
        """The gate's rows [T, G, E] of a text."""
        wide = gate.astype(np.float64)
        self.positions += len(gate)
        self.total += wide.sum(0)
        self.squares += (wide**2).sum(0)
        self.tops += np.eye(gate.shape[-1])[gate.argmax(-1)].sum(0)
        self.entropy += entropy(wide).sum(0)

    @property
    def mean(self) -> Wide:
        """Mean scalings [G, E]."""
        return self.total / self.positions


def entropy(scalings: Wide) -> Wide:
    """Nats of |s| / sum |s| over the last axis; 0 where nothing is on. A gate without softmax may be negative."""
    size = np.abs(scalings)
    total = size.sum(-1, keepdims=True)
    shares = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    result: Wide = -(shares * logs).sum(-1)
    return result


def statistics(tally: GateTally, experts: Sequence[str], paths: Sequence[str]) -> GateStatistics:
    """Rows by site, and their means by block and over the model. `paths`: the G sites; one name when they share."""
    mean = tally.mean
    deviation = np.sqrt(np.maximum(tally.squares / tally.positions - mean**2, 0))
    tops, entropies = tally.tops / tally.positions, tally.entropy / tally.positions
    information = np.maximum(entropy(mean) - entropies, 0)

    def row(name: str, of: NDArray[np.intp]) -> GateRow:
        by_expert = [dict(zip(experts, x[of].mean(0).tolist(), strict=True)) for x in (mean, deviation, tops)]
        nats = float(entropies[of].mean())
        evenness = nats / np.log(len(experts)) if len(experts) > 1 else 0.0
        return GateRow(
            name=name,
            mass=by_expert[0],
            deviation=by_expert[1],
            top1=by_expert[2],
            entropy=nats,
            evenness=float(evenness),
            information=float(information[of].mean()),
        )

    places = np.arange(len(paths))
    blocks = np.array(list(blocks_of(paths)))
    return GateStatistics(
        positions=tally.positions,
        shared=len(paths) == 1,
        model=row("model", places),
        blocks=tuple(row(str(block), places[blocks == block]) for block in dict.fromkeys(blocks)),
        sites=tuple(row(path, places[number : number + 1]) for number, path in enumerate(paths)),
    )
