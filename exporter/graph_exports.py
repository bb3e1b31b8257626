"""The graphs of a build: the dynamic one and a static one for each folded mix, in one store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from exporter.encoder import signature_of as encoder_signature_of
from exporter.gate import Gate
from exporter.graphs import Exported, GraphPlan, export_graph
from exporter.hot_build import initial_stack, stack_weights
from exporter.merges.merge import SiteMerge, settled
from exporter.model_facts import signature_shape
from exporter.parts import Parts, quantizer_of
from exporter.passes.pipeline import OPSETS
from exporter.quantization import Quantizer
from exporter.router_choice import settled_router
from exporter.shards import kept_shards, lazy_weight
from exporter.sites import Site
from exporter.spec import BuildSpec, CacheChoice, DType, OpChoice, VariantSpec
from exporter.static import (
    folded_weights,
    mix_rows,
    replaced_weights,
    replacements_of,
    rounded_weights,
    touched_sites,
    untied,
    without_twin,
)
from exporter.store import Weight, WeightStore
from exporter.variants import has_row_per_site, static_variants
from plugins.operators import GATE_SCALINGS, GATED_LOW_RANK
from runtime.adapter_inputs import STACK_PATH, stack_specs
from runtime.manifest import Emit, GraphInfo, MergeInfo, MixInfo, Mode, OnnxRuntimeForm
from runtime.signature import CacheStyle, Signature, in_style, signature_from_shape


def open_store(parts: Parts, spec: BuildSpec, dtype: DType, root: Path) -> WeightStore:
    """The store of the build's graphs in one dtype.

    Where the build's dtype is the checkpoint's, shards are taken over as they are; its fp32 twin reads as upright.
    """
    root.mkdir(exist_ok=True)
    if spec.quantize is not None:  # few tensors of a shard would be read
        return WeightStore(root)
    shards = kept_shards(parts.inputs.base, getattr(torch, spec.dtype.value), parts.blank)
    store = WeightStore(root, shards.names)
    if dtype is spec.dtype:
        store.keep(shards.files)
    return store


def export_graphs(
    parts: Parts,
    spec: BuildSpec,
    dtype: DType,
    store: WeightStore,
    twin: WeightStore | None = None,
    hessians: Mapping[str, torch.Tensor] | None = None,
) -> list[Exported]:
    """All graphs of the build in one dtype, in one store; dynamic first, for static ones point into its weights.

    `twin` is the store of the fp32 build that is being rounded; `hessians` are what GPTQ rounds by.
    """
    quantizer = quantizer_of(parts, spec)
    if quantizer is not None:
        quantizer = replace(quantizer, twin=twin, hessians=hessians or {})
    graphs = [export_dynamic(parts, spec, dtype, store, quantizer)] if Mode.DYNAMIC in spec.modes else []
    for variant in static_variants(spec):
        graphs.append(export_static(parts, spec, variant, dtype, store, twin, quantizer))
    return graphs


def export_dynamic(
    parts: Parts, spec: BuildSpec, dtype: DType, store: WeightStore, quantizer: Quantizer | None = None
) -> Exported:
    """The gated graph. G = number of sites with a layerwise gate or mixes by site, else 1."""
    gate = parts.gate
    scalings = len(parts.sites) if has_row_per_site(spec, parts.inputs.adapters) else 1
    router = settled_router(spec, parts.inputs.adapters)
    signature = signature_for(parts, spec, dtype, scalings, has_router=router is not None)
    if parts.hot is not None:
        signature = replace(signature, inputs=(*signature.inputs, *stack_specs(parts.hot.sites, dtype.value)))
        stack = initial_stack(parts.hot, parts.inputs.adapters, dtype.value)
        store.write(Path(STACK_PATH).stem, stack_weights(stack, dtype.value))
    plan = GraphPlan(
        "dynamic",
        signature,
        spec.emit,
        parts.sites,
        gate,
        spec.site_op,
        router,
        encoder=parts.inputs.encoder,
        lazy=lazy_weights(parts, dtype),
        onnxruntime=onnxruntime_form("dynamic", signature, spec, dtype),
        quantizer=quantizer,
    )
    return Exported(
        graph_info(plan, Mode.DYNAMIC, None, plugins_of(spec, gate)), export_graph(parts.model, plan, store), store
    )


def lazy_weights(parts: Parts, dtype: DType) -> dict[str, Weight]:
    """What the store writes of a model without values."""
    stored = {} if parts.blank is None else parts.blank.stored
    return {name: lazy_weight(name, tensor, getattr(torch, dtype.value)) for name, tensor in stored.items()}


def signature_for(parts: Parts, spec: BuildSpec, dtype: DType, scalings: int, *, has_router: bool = False) -> Signature:
    """The signature of a dynamic graph with that many rows of scalings a token, 0 of a static one."""
    experts = len(parts.inputs.adapters.experts) if parts.hot is None else parts.hot.max_experts
    experts = experts if scalings else 0
    gate = parts.gate is not None and scalings > 0
    if parts.inputs.encoder is not None:
        return encoder_signature_of(parts.model, parts.inputs.encoder, scalings, experts, gate=gate)
    shape = signature_shape(parts.model, scalings, experts, gate=gate, dtype=dtype, cache=cache_style(spec))
    return signature_from_shape(replace(shape, router=has_router))


def export_static(
    parts: Parts,
    spec: BuildSpec,
    variant: VariantSpec,
    dtype: DType,
    store: WeightStore,
    twin: WeightStore | None,
    quantizer: Quantizer | None = None,
) -> Exported:
    """The plain base graph with the mix folded in; only the changed tensors are stored anew."""
    model, name, experts = parts.model, variant.name, parts.inputs.adapters.experts
    names = [expert.name for expert in experts]
    rows, merge = mix_rows(variant.mix, names, [site.path for site in parts.sites]), settled(spec.merge)
    signature = signature_for(parts, spec, dtype, 0)
    sites = touched_sites(parts.sites, rows)
    torch_dtype = getattr(torch, dtype.value)
    measures: dict[str, SiteMerge] = {}
    tying = parts.inputs.base.tying
    new = replacements_of(experts, variant.mix.weights, tying)
    values = None if parts.blank is None else parts.blank.read
    changed = folded_weights(model, sites, rows, name, merge, measures, values)
    changed |= replaced_weights(model, without_twin(new, tying), name, values)
    if twin:
        halves = rounded_weights(twin, torch_dtype, name)
        # Quantised ones lie in the twin as integers; what is folded here tells their shapes only.
        changed = halves if quantizer is None else {each: halves.get(each, weight) for each, weight in changed.items()}
    with untied(model, sites, [] if tying is None else tying.parted(new)) as partners:
        plan = GraphPlan(
            name,
            signature,
            spec.emit,
            changed=changed,
            partners=partners,
            encoder=parts.inputs.encoder,
            lazy=lazy_weights(parts, dtype),
            onnxruntime=onnxruntime_form(name, signature, spec, dtype),
            quantizer=quantizer,
        )
        info = static_info(graph_info(plan, Mode.STATIC, None), variant.mix, merge)
        return Exported(info, export_graph(model, plan, store), store, in_site_order(sites, measures))


def in_site_order(sites: Sequence[Site], measures: Mapping[str, SiteMerge]) -> tuple[SiteMerge, ...]:
    """The store writes by name."""
    return tuple(measures[site.path] for site in sites if site.path in measures)


def static_rows(parts: Parts, spec: BuildSpec) -> torch.Tensor:
    """[sites, E]: the spec's mix."""
    mix = spec.mix_info
    assert mix is not None
    return mix_rows(mix, [expert.name for expert in parts.inputs.adapters.experts], [site.path for site in parts.sites])


def static_info(info: GraphInfo, mix: MixInfo, merge: MergeInfo) -> GraphInfo:
    """The record of a static graph: which mix, and how it was merged."""
    return info.model_copy(update={"mix": mix.weights, "mix_sites": mix.sites, "merge": merge})


def cache_style(spec: BuildSpec) -> CacheStyle:
    """How this build's graphs carry K/V."""
    if spec.cache is CacheChoice.NONE:
        return CacheStyle.NONE
    return CacheStyle.ALIAS if spec.emit is Emit.MODERN else CacheStyle.APPEND


def plugins_of(spec: BuildSpec, gate: Gate | None) -> tuple[str, ...]:
    """The operators of ours that the dynamic graph will have."""
    chosen = ((GATE_SCALINGS, spec.gate_op if gate else OpChoice.OPS), (GATED_LOW_RANK, spec.site_op))
    return tuple(name for name, choice in chosen if choice is OpChoice.PLUGIN)


def graph_info(plan: GraphPlan, mode: Mode, mix: dict[str, float] | None, plugins: tuple[str, ...] = ()) -> GraphInfo:
    """The manifest's record of a graph."""
    return GraphInfo(
        name=plan.name,
        mode=mode,
        emit=plan.emit,
        opset=plan.opset,
        path=f"{plan.name}.onnx",
        signature=plan.signature,
        mix=mix,
        router=plan.router,
        plugins=plugins,
        onnxruntime=plan.onnxruntime,
    )


def onnxruntime_form(name: str, signature: Signature, spec: BuildSpec, dtype: DType) -> OnnxRuntimeForm | None:
    """What a graph's form for ONNX Runtime will be: float32 decoders with caches have one, unless nobody wants it.

    Not the fp32 twin of another dtype: its forms would be made and verified to be thrown away.
    """
    is_float32 = dtype is DType.FLOAT32 and spec.dtype is DType.FLOAT32
    if not spec.onnxruntime or not is_float32 or not signature.carries:
        return None
    style = in_style(signature, CacheStyle.ALIAS)
    return OnnxRuntimeForm(path=f"{name}.ort.onnx", opset=OPSETS[Emit.MODERN], signature=style)
