"""From what a request asks for to its graph and routing: a variant by name, a mix, or the graph's own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.adapter_inputs import adapter_inputs
from runtime.decode import StepCount
from runtime.errors import InputError
from runtime.manifest import AdapterKind, GraphInfo, Manifest, MixInfo
from runtime.mix import require_unmixed
from runtime.mix_file import scalings_from_file
from runtime.model import variant_named
from runtime.passes import CHUNK, ExactPasses, Floats, InChunks, Passes, Routing, WholeSequence
from runtime.session import Session
from runtime.signature import GATE, SCALINGS, CacheStyle
from runtime.stacks import Stack

Columns = Mapping[str, int]  # expert -> its entry in the scalings
Mix = Mapping[str, float] | MixInfo  # by expert name, {} for the base model; MixInfo also by site


@dataclass(frozen=True, slots=True)
class Route:
    """Which graph runs a request, and under which scalings."""

    graph: str
    routing: Routing


def route_for(
    manifest: Manifest, graph: GraphInfo, variant: str | None, mix: Mix | None, loaded: Columns | None = None
) -> Route:
    """The variant of that name on its graph, else a mix or the default on `graph`.

    `loaded`: the adapters of a graph whose adapters are inputs; each is a variant by its name.
    """
    if variant is None:
        return Route(graph.name, routing_for(manifest, graph, mix, loaded))
    if mix is not None:
        raise InputError("a variant says how its experts are mixed", got=f"variant {variant} and a mix", need="one")
    if loaded is not None and variant in loaded:
        hot = next(graph for graph in manifest.graphs if adapter_inputs(graph.signature))
        return Route(hot.name, routing_for(manifest, hot, {variant: 1.0}, loaded))
    found = variant_named(manifest, variant)
    [its] = (graph for graph in manifest.graphs if graph.name == found.graph)
    return Route(its.name, routing_for(manifest, its, found.mix, loaded))


def routing_for(manifest: Manifest, graph: GraphInfo, mix: Mix | None, loaded: Columns | None = None) -> Routing:
    """The routing of a request on a graph: its mix where it has one, else its router or gate, else the only expert."""
    spec = graph.signature.input(SCALINGS)
    if spec is None:
        if mix is not None:
            raise InputError("this graph has its mix built in", where=f"graph {graph.name}", got="a mix", need="none")
        return Routing(None)
    if mix is None and graph.router is not None:
        return Routing(np.ones((int(spec.shape[2]), len(manifest.experts)), np.float32), is_routed=True)
    gate = manifest.gate if mix is None and graph.signature.output(GATE) else None
    if gate is None:
        columns = _columns(manifest) if loaded is None else loaded
        mix = _only_expert(list(columns)) if mix is None else mix
        rows = _rows(manifest, graph, mix, int(spec.shape[2]), list(columns))
        wide = np.zeros((len(rows), int(spec.shape[3])), np.float32)
        wide[:, list(columns.values())] = rows
        return Routing(wide)
    if gate.scaling_pass_row_per_length and graph.signature.cache_style is not CacheStyle.NONE:
        raise InputError(
            "the flattened top-k softmax depends on the sequence length, which a K/V cache cannot follow",
            where=f"graph {graph.name}",
            fix="build with --cache none",
        )
    row = np.tile(np.array(gate.scaling_pass_row, np.float32), (int(spec.shape[2]), 1))
    return Routing(row, is_gated=True, per_length=gate.scaling_pass_row_per_length)


def open_passes(
    session: Session, routings: Sequence[Routing], adapters: Stack | None = None, steps: StepCount | None = None
) -> Passes:
    """The passes that decode a batch, one routing a row; all rows read the same adapters."""
    passes = ExactPasses(session, routings, adapters if adapter_inputs(session.signature) else None, steps)
    if session.signature.cache_style is CacheStyle.NONE:
        return WholeSequence(passes)
    return in_chunks(session, passes)


def in_chunks(session: Session, passes: Passes) -> Passes:
    """Passes of which no step is longer than memory and the session allow."""
    return InChunks(passes, min(CHUNK, session.limits.tokens))


def _rows(manifest: Manifest, graph: GraphInfo, mix: Mix, sites: int, experts: Sequence[str]) -> Floats:
    """[G, experts] of a mix."""
    mix = mix if isinstance(mix, MixInfo) else MixInfo.model_construct(weights=dict(mix), sites={})
    paths = [site.path for site in manifest.sites]
    doras = [expert.name for expert in manifest.experts if expert.kind is AdapterKind.DORA]
    for weights in (mix.weights, *mix.sites.values()):
        require_unmixed(weights, doras)
    if mix.is_per_site and sites != len(paths):
        raise InputError(
            "this graph has one row of scalings for all its sites",
            where=f"graph {graph.name}",
            got=f"a mix with weights of their own for {len(mix.sites)} sites",
            fix="build with --scalings sites",
            code="E_MIX",
        )
    rows = scalings_from_file(mix, experts, paths)
    return rows if len(rows) == sites else np.tile(rows, (sites, 1))


def _columns(manifest: Manifest) -> dict[str, int]:
    """Expert -> its column, in the order of the gate's columns."""
    return {expert.name: expert.column for expert in sorted(manifest.experts, key=lambda expert: expert.column)}


def _only_expert(experts: Sequence[str]) -> Mix:
    if len(experts) == 1:
        return {experts[0]: 1.0}
    if not experts:
        raise InputError(
            "no adapter is loaded", got="no mix", fix="load one, or ask for the base: --mix base", code="E_MIX"
        )
    example = ",".join(f"{name}={1 / len(experts):.2g}" for name in experts)
    raise InputError(
        "this bundle has several experts and no gate: say how to mix them",
        got="no mix",
        need=f"weights for some of: {', '.join(experts)}",
        fix=f"--mix {example}",
        code="E_MIX",
    )
