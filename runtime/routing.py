"""Where a request's scalings come from: the gate, a mix, the only expert, or nowhere (static)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.manifest import AdapterKind, GraphInfo, Manifest
from runtime.mix import require_unmixed, scalings_from_mix
from runtime.passes import CHUNK, ExactPasses, InChunks, OnePass, Passes, WholeSequence
from runtime.session import Session
from runtime.signature import GATE, SCALINGS, CacheStyle


@dataclass(frozen=True, slots=True)
class Routing:
    """The constant scalings row of the first pass, and whether the gate then makes those of a second."""

    row: NDArray[np.float32] | None  # [G, E]; None: the graph takes no scalings
    is_gated: bool
    per_length: bool = False  # the gate's constant row is divided by the sequence length

    def open(self, session: Session, batch: int) -> Passes:
        """The passes that decode a batch under this routing."""
        passes: Passes
        if self.is_gated and self.row is not None:
            passes = ExactPasses(session, batch, self.row, per_length=self.per_length)
        else:
            passes = OnePass(session, batch, self.row)
        if session.signature.cache_style is CacheStyle.NONE:
            return WholeSequence(passes)
        return InChunks(passes, min(CHUNK, session.limits.tokens))


def routing_for(manifest: Manifest, graph: GraphInfo, mix: Mapping[str, float] | None) -> Routing:
    """The routing of a request: its mix where it has one, else the gate, else the only expert there is."""
    spec = graph.signature.input(SCALINGS)
    if spec is None:
        if mix is not None:
            raise InputError("this graph has its mix built in", where=f"graph {graph.name}", got="a mix", need="none")
        return Routing(None, is_gated=False)
    experts = [expert.name for expert in sorted(manifest.experts, key=lambda expert: expert.column)]
    gate = manifest.gate if mix is None and graph.signature.output(GATE) else None
    if gate is not None:
        weights, per_length = np.array(gate.scaling_pass_row, np.float32), gate.scaling_pass_row_per_length
    else:
        chosen = _only_expert(experts) if mix is None else mix
        weights, per_length = scalings_from_mix(chosen, experts), False
        require_unmixed(chosen, [expert.name for expert in manifest.experts if expert.kind is AdapterKind.DORA])
    if per_length and graph.signature.cache_style is not CacheStyle.NONE:
        raise InputError(
            "the flattened top-k softmax depends on the sequence length, which a K/V cache cannot follow",
            where=f"graph {graph.name}",
            fix="build with --cache none",
        )
    return Routing(np.tile(weights, (int(spec.shape[2]), 1)), gate is not None, per_length)


def _only_expert(experts: list[str]) -> Mapping[str, float]:
    if len(experts) == 1:
        return {experts[0]: 1.0}
    example = ",".join(f"{name}={1 / len(experts):.2g}" for name in experts)
    raise InputError(
        "this bundle has several experts and no gate: say how to mix them",
        got="no mix",
        need=f"weights for some of: {', '.join(experts)}",
        fix=f"--mix {example}",
        code="E_MIX",
    )
