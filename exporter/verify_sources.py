"""Verification of a published bundle against the checkpoints it was built from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from exporter.build_bundle import Parts, export_graphs, load_parts, make_verification, read_inputs
from exporter.checkpoints import compare_sources, source_files
from exporter.graphs import Exported
from exporter.rounding import require_rounded
from exporter.spec import BuildSpec, CacheChoice, DType
from exporter.store import WeightStore
from exporter.tokenizer import load_tokenizer
from runtime.bundle import Bundle
from runtime.manifest import Check, GraphInfo, Manifest, MergeInfo
from runtime.mix_file import MixFile
from runtime.signature import CacheStyle


def verify_against_sources(bundle: Bundle, sources: BuildSpec) -> dict[str, tuple[Check, ...]]:
    """The sources' digests, then stage A by graph name; fp16 and bf16 bundles through a fresh fp32 twin."""
    spec = spec_from_manifest(bundle.manifest, sources)
    inputs = read_inputs(spec)
    compare_sources(bundle.manifest.sources, source_files(inputs.adapters, inputs.base))
    parts = load_parts(inputs)
    if spec.dtype is DType.FLOAT32:
        return _measure(parts, spec, bundle.root, bundle, bundle.manifest.graphs)
    with tempfile.TemporaryDirectory(prefix="xlora-twin-") as folder:
        root = Path(folder)
        twins = export_graphs(parts, spec, DType.FLOAT32, root)
        for twin in twins:
            published = ir.load(bundle.file(twin.info.path))
            require_rounded(twin, Exported(twin.info, published, WeightStore(bundle.root)))
        return _measure(parts, spec, root, bundle, [twin.info for twin in twins])


def spec_from_manifest(manifest: Manifest, sources: BuildSpec) -> BuildSpec:
    """The settings the bundle was built with, on the given sources."""
    first = manifest.graphs[0]
    static = [graph for graph in manifest.graphs if graph.mix is not None]
    mixes = [MixFile(weights=graph.mix or {}, sites=graph.mix_sites) for graph in static]
    merges = [graph.merge for graph in static if graph.merge is not None]
    return replace(
        sources,
        modes=tuple(graph.mode for graph in manifest.graphs),
        mix=mixes[0] if mixes else None,
        merge=merges[0] if merges else MergeInfo(),
        emit=first.emit,
        dtype=DType(manifest.base.dtype),
        cache=CacheChoice.NONE if first.signature.cache_style is CacheStyle.NONE else CacheChoice.KV,
        topk_softmax=manifest.gate.topk_softmax if manifest.gate and manifest.gate.softmax_topk else None,
    )


def _measure(
    parts: Parts, spec: BuildSpec, folder: Path, bundle: Bundle, graphs: Sequence[GraphInfo]
) -> dict[str, tuple[Check, ...]]:
    verification = make_verification(parts, spec, load_tokenizer(bundle.root))
    return {graph.name: verification.run(folder, graph)[0].checks for graph in graphs}
