"""Verification of a published bundle against the checkpoints it was built from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporter.checkpoints import compare_sources, source_files
from exporter.errors import VerifyError
from exporter.graph_exports import export_graphs, open_store
from exporter.graphs import Exported
from exporter.hot_build import initial_stack
from exporter.inputs import read_inputs
from exporter.merges.merge import settled
from exporter.parts import Parts, load_parts, make_verification
from exporter.rounding import require_rounded
from exporter.spec import BuildSpec, CacheChoice, DType, HotSpec, RouterSpec, ScalingsChoice, VariantSpec
from exporter.store import WeightStore
from exporter.tokenizer import load_tokenizer, require_source_tokenizer
from exporter.variants import STATIC
from runtime.bundle import Bundle
from runtime.manifest import Check, GraphInfo, HotInfo, Manifest, MergeInfo, MixInfo, Mode
from runtime.mix import BASE
from runtime.quantization import QuantizeMethod
from runtime.routers import RouterKind
from runtime.signature import SCALINGS, CacheStyle
from runtime.stacks import read_stack


def verify_against_sources(bundle: Bundle, sources: BuildSpec) -> dict[str, tuple[Check, ...]]:
    """The sources' digests, then stage A by graph name; fp16 and bf16 bundles through a fresh fp32 twin."""
    spec = spec_from_manifest(bundle.manifest, sources)
    require_repeatable(spec, bundle)
    inputs = read_inputs(replace(spec, quantize=None))  # whose settings the build has checked
    found = source_files(inputs.adapters, inputs.base, tokenizer=spec.tokenizer)
    compare_sources(bundle.manifest.sources, found)
    require_source_tokenizer(inputs.base, spec.tokenizer, bundle.manifest.tokenizer, bundle.root)
    parts = load_parts(inputs, hot=spec.hot)
    if parts.hot is not None:
        require_same_stack(bundle, parts)
    if spec.dtype is DType.FLOAT32:
        return _measure(parts, spec, bundle.root, bundle, bundle.manifest.graphs)
    with tempfile.TemporaryDirectory(prefix="xlora-twin-") as folder:
        root = Path(folder)
        twins = export_graphs(parts, spec, DType.FLOAT32, open_store(parts, spec, DType.FLOAT32, root))
        for twin in twins:
            published = ir.load(bundle.file(twin.info.path))
            require_rounded(twin, Exported(twin.info, published, WeightStore(bundle.root)))
        return _measure(parts, spec, root, bundle, [twin.info for twin in twins])


def require_repeatable(spec: BuildSpec, bundle: Bundle) -> None:
    """Refuse where the twin of a rounded bundle cannot be made again: GPTQ's integers depend on its texts."""
    if spec.dtype is not DType.FLOAT32 and spec.quantize and spec.quantize.method is QuantizeMethod.GPTQ:
        raise VerifyError(
            f"a {spec.dtype} bundle rounded by GPTQ cannot be made again without its texts (its digests are right)",
            where=str(bundle.root),
            fix="`record` and `runtime compare` check it on the device",
            code="E_UNSUPPORTED",
        )


def require_same_stack(bundle: Bundle, parts: Parts) -> None:
    """The adapters that the bundle starts with are the sources', rounded to its dtype."""
    assert parts.hot is not None
    if parts.hot != bundle.manifest.hot:
        raise VerifyError("its adapter inputs are not those of the sources", where=str(bundle.root), code="E_VERIFY")
    dtype = bundle.manifest.base.dtype
    stored = read_stack(bundle.file(parts.hot.path), parts.hot, dtype)
    made = initial_stack(parts.hot, parts.inputs.adapters, dtype)
    for name, array in made.tensors.items():
        if not np.array_equal(array, stored.tensors[name]):
            what = f"{name} of the adapters it starts with is not the sources'"
            raise VerifyError(what, where=str(bundle.root), code="E_VERIFY")


def spec_from_manifest(manifest: Manifest, sources: BuildSpec) -> BuildSpec:
    """The settings the bundle was built with, on the given sources."""
    first = manifest.graphs[0]
    folded = {
        graph.name: MixInfo(weights=graph.mix, sites=graph.mix_sites)
        for graph in manifest.graphs
        if graph.mix is not None
    }
    dynamic = next((graph for graph in manifest.graphs if graph.mode is Mode.DYNAMIC), None)
    return replace(
        sources,
        modes=tuple(dict.fromkeys(graph.mode for graph in manifest.graphs)),
        mix=folded.pop(STATIC, None),
        merge=merge_of(manifest),
        variants=(
            *named_rows(manifest),
            *(VariantSpec(name, mix, is_static=True) for name, mix in folded.items()),
        ),
        scalings=scalings_of(dynamic, len(manifest.sites)) if dynamic else None,
        router=router_of(dynamic) if dynamic else None,
        hot=hot_spec(manifest.hot),
        emit=first.emit,
        onnxruntime=first.onnxruntime is not None,
        task=manifest.task,
        pooling=manifest.encoder.pooling if manifest.encoder else None,
        normalize=manifest.encoder.normalize if manifest.encoder and manifest.encoder.pooling else None,
        dtype=DType(manifest.base.dtype),
        quantize=manifest.quantization,
        accept_loss=True,  # what it costs was accepted when the bundle was built
        cache=CacheChoice.NONE if first.signature.cache_style is CacheStyle.NONE else CacheChoice.KV,
        topk_softmax=manifest.gate.topk_softmax if manifest.gate and manifest.gate.softmax_topk else None,
    )


def named_rows(manifest: Manifest) -> Iterator[VariantSpec]:
    """The mixes that `--variants` named: all but the base's and the experts' own."""
    implicit = {BASE, *(expert.name for expert in manifest.experts)}
    for variant in manifest.variants:
        if variant.mix is not None and variant.name not in implicit:
            yield VariantSpec(variant.name, variant.mix)


def merge_of(manifest: Manifest) -> MergeInfo:
    """How all its static graphs were merged: a build has one method for them."""
    static = [graph for graph in manifest.graphs if graph.mode is Mode.STATIC]
    found = {settled(graph.merge or MergeInfo()): graph.name for graph in static}
    if len(found) > 1:
        raise VerifyError(
            "its static graphs were merged in more than one way, which no build does",
            got=", ".join(f"{name} by {merge.method}" for merge, name in found.items()),
            need="one --merge with the same options for all",
            code="E_VERIFY",
        )
    return next(iter(found), MergeInfo())


def router_of(graph: GraphInfo) -> RouterSpec | None:
    """The router inside this graph's sites, as it was asked for; a gate needs no asking."""
    info = graph.router
    return None if info is None else RouterSpec(RouterKind(info.kind), **info.model_dump(exclude={"kind"}))


def hot_spec(hot: HotInfo | None) -> HotSpec | None:
    """The settings behind adapters that are inputs, every site by its path."""
    if hot is None:
        return None
    return HotSpec(hot.max_total_rank, hot.max_experts, tuple(site.path for site in hot.sites))


def scalings_of(graph: GraphInfo, sites: int) -> ScalingsChoice:
    """How many rows of scalings this graph takes."""
    scalings = graph.signature.input(SCALINGS)
    return ScalingsChoice.SITES if scalings and scalings.shape[2] == sites else ScalingsChoice.SHARED


def _measure(
    parts: Parts, spec: BuildSpec, folder: Path, bundle: Bundle, graphs: Sequence[GraphInfo]
) -> dict[str, tuple[Check, ...]]:
    verification = make_verification(parts, spec, load_tokenizer(bundle.root, bundle.manifest.tokenizer))
    return {graph.name: verification.run(folder, graph)[0].checks for graph in graphs}
