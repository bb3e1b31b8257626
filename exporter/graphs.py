"""One graph of a bundle: traced, rewritten, its weights put into the store, saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from exporter.blocks import find_blocks, of_blocks, only_traced
from exporter.dynamic import MODEL, TracedModel, refusing_untraceable, traced_model
from exporter.encoder import TracedEncoder, traced_encoder
from exporter.gate import Gate
from exporter.gated import DoraModule, Down, GatedModule, PluginModule
from exporter.merges.merge import SiteMerge
from exporter.passes.instantiate_blocks import InstantiateBlocksPass
from exporter.passes.pipeline import OPSETS, clean_trace, write_form, write_onnxruntime_form
from exporter.quantization import Quantizer, StoredPart, quantize_graph, stored_parts
from exporter.sites import Site
from exporter.spec import OpChoice
from exporter.store import TRANSPOSED, Weight, WeightStore, transposed, weight_from_tensor
from exporter.trace import trace
from runtime.adapter_inputs import adapter_inputs
from runtime.manifest import Emit, EncoderInfo, GraphInfo, OnnxRuntimeForm
from runtime.routers import RouterInfo
from runtime.signature import SCALINGS, CacheStyle, Signature, in_style

QUANTIZED_OPSET = 21  # the first whose DequantizeLinear has blocks


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """What one graph is made of; a static graph has no sites and no gate.

    For static only: `changed`, parameter name -> the weight that stands in its place; `partners`, parameter name -> the
    parameter that it is tied to in the base and whose stored tensor it points to.
    """

    name: str
    signature: Signature
    emit: Emit
    sites: Sequence[Site] = ()
    gate: Gate | None = None
    site_op: OpChoice = OpChoice.OPS
    router: RouterInfo | None = None
    changed: Mapping[str, Weight] = field(default_factory=dict)
    partners: Mapping[str, str] = field(default_factory=dict)
    lazy: Mapping[str, Weight] = field(default_factory=dict)  # parameter -> its values, where the model has none
    encoder: EncoderInfo | None = None  # None: a decoder
    onnxruntime: OnnxRuntimeForm | None = None  # where the graph has such a form, too
    quantizer: Quantizer | None = None  # None: all weights are floats

    @property
    def opset(self) -> int:
        """Of ONNX's own operators."""
        return max(OPSETS[self.emit], QUANTIZED_OPSET) if self.quantizer else OPSETS[self.emit]


@dataclass(frozen=True, slots=True)
class Exported:
    """A graph that lies in its store's root."""

    info: GraphInfo
    model: ir.Model
    store: WeightStore
    merges: Sequence[SiteMerge] = ()  # what a static fp32 graph's merge did, module by module


def export_graph(model: PreTrainedModel, plan: GraphPlan, store: WeightStore) -> ir.Model:
    """Trace, rewrite, store the weights that are not yet there, save NAME.onnx under the store's root.

    Beside it goes the form for ONNX Runtime, where the plan has one. The graph itself is returned.
    """
    base_names = {id(parameter): name for name, parameter in model.named_parameters()}
    with refusing_untraceable(model, f"graph {plan.name}"), traced_as(model, plan, store) as traced:
        weights = named_weights(base_names, traced)
        tensors = {name: stored_weight(plan, name, tensor) for name, tensor in weights.values()}
        tensors |= {name: weight for name, weight in plan.changed.items() if name in tensors}
        names = {traced_name: name for traced_name, (name, _) in weights.items()}
        lie_upright = {name for name, weight in tensors.items() if store.lies_upright(weight.name)}
        graph, blocks = traced_blocks(traced, plan, names, lie_upright)
    transposes = {name: f"{name}{TRANSPOSED}" for name in tensors if name not in lie_upright}
    clean_trace(graph, names, transposes, blocks)
    forms = {}
    if plan.onnxruntime is not None:
        forms[plan.onnxruntime.path] = write_onnxruntime_form(graph.clone(), plan.onnxruntime.signature)
    forms[f"{plan.name}.onnx"] = write_form(graph, plan.emit, plan.opset, plan.signature)
    base = frozenset(base_names.values())
    for path, form in forms.items():
        rounded = quantized_weights(form, plan, model, tensors)
        read = initializers(form, tensors)
        stored = [*read.values(), *((part.parameter, part.weight) for part in rounded)]
        store.write("base", [weight for name, weight in stored if name in base and name not in plan.changed])
        store.write("adapters", [weight for name, weight in stored if name not in base])
        store.write(plan.name, [weight for name, weight in stored if name in plan.changed])
        for part in rounded:
            _point_to(store, form, part.initializer, part.weight, part.packed)
        for initializer, (_, weight) in read.items():
            _point_to(store, form, initializer, weight)
        form.graph.name = plan.name
        ir.save(form, store.root / path)
    return graph


def _point_to(
    store: WeightStore,
    graph: ir.Model,
    initializer: str,
    weight: Weight,
    packed: tuple[ir.DataType, tuple[int, ...]] | None = None,
) -> None:
    """Let an initializer be a stored tensor."""
    value = graph.graph.initializers[initializer]
    value.const_value = store.external(weight.name, packed)
    value.const_value.name = initializer


def quantized_weights(
    graph: ir.Model, plan: GraphPlan, model: PreTrainedModel, tensors: Mapping[str, Weight]
) -> list[StoredPart]:
    """What is to be stored of the quantised weights, which the graph reads through DequantizeLinear from here on."""
    if plan.quantizer is None:
        return []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameter_of = {path: names[id(model.get_submodule(path).weight)] for path in plan.quantizer.info.modules}
    return [
        part
        for weight in quantize_graph(graph, plan.quantizer, parameter_of)
        for dtype in [tensors[weight.parameter].dtype]
        for part in stored_parts(weight, tensors[weight.parameter], dtype, plan.quantizer)
    ]


def traced_blocks(
    traced: TracedModel | TracedEncoder, plan: GraphPlan, names: Mapping[str, str], lie_upright: Collection[str]
) -> tuple[ir.Model, InstantiateBlocksPass | None]:
    """The trace, of one block of each kind where there are several of one, and then the pass that makes the others.

    `names`: traced name of a parameter -> ours; `lie_upright`: ours of those that are stored as they are.
    """
    own = {name.removeprefix(f"{MODEL}."): ours for name, ours in names.items()}
    blocks = find_blocks(traced.model, own, lambda name: (name in lie_upright, name in plan.changed))
    opset = OPSETS[Emit.PORTABLE]
    signature = in_style(plan.signature, CacheStyle.APPEND)  # attention gives new K/V; its lowering says where they go
    if blocks is None:
        return trace(traced, signature, opset), None
    copies = blocks.copies()
    few = of_blocks(signature, copies)
    if isinstance(traced, TracedModel):
        traced.blocks, traced.hot = blocks.traced, [spec.name for spec in adapter_inputs(few)]
    with only_traced(blocks):
        return trace(traced, few, opset), InstantiateBlocksPass(copies, signature)


def stored_weight(plan: GraphPlan, name: str, tensor: torch.Tensor) -> Weight:
    """What the store is to hold of a weight that no graph changes; of a tied one under the name of both."""
    shared = plan.partners.get(name, name)
    return plan.lazy.get(shared) or weight_from_tensor(shared, tensor)


def traced_as(
    model: PreTrainedModel, plan: GraphPlan, store: WeightStore
) -> AbstractContextManager[TracedModel] | AbstractContextManager[TracedEncoder]:
    """The model as this plan wants it traced: a decoder's step, or an encoder's whole texts.

    Weights that lie upright are read where they lie: to join one with its update would be a copy.
    """
    apart = [site.path for site in plan.sites] if store.upright else plan.quantizer.products if plan.quantizer else ()
    if plan.encoder is not None:
        return traced_encoder(model, plan.sites, plan.gate, plan.encoder, shared=is_shared(plan), apart=apart)
    return traced_model(
        model,
        plan.sites,
        plan.gate,
        plan.signature.cache_style,
        shared=is_shared(plan),
        with_plugin=plan.site_op is OpChoice.PLUGIN,
        router=plan.router,
        hot=[spec.name for spec in adapter_inputs(plan.signature)],
        apart=apart,
    )


def initializers(graph: ir.Model, tensors: Mapping[str, Weight]) -> dict[str, tuple[str, Weight]]:
    """Initializer -> (parameter, what the store is to hold for it), for every weight that the graph still reads."""
    ways = {
        **{name: (name, weight) for name, weight in tensors.items()},
        **{f"{name}{TRANSPOSED}": (name, transposed(weight)) for name, weight in tensors.items()},
    }
    return {name: way for name, way in ways.items() if name in graph.graph.initializers}


def named_weights(
    base_names: Mapping[int, str], traced: TracedModel | TracedEncoder
) -> dict[str, tuple[str, torch.Tensor]]:
    """Traced name -> (our name, tensor): base names as in the checkpoint; SITES.lora_a, SITE.lora_b, SITE.out_shift,
    SITES.prototypes and SITES.owners of a router, columns.*, gate.*.

    `base_names` maps parameter identity to its name in the plain model; a tied weight is one under its first name.
    """
    names = dict(base_names)
    for module in traced.modules():
        if isinstance(module, Down):
            names[id(module.lora_a)] = f"{module.path}.lora_a"
            if module.router is not None:
                names |= {id(value): f"{module.path}.{name}" for name, value in module.router.named_parameters()}
        elif isinstance(module, DoraModule):
            names[id(module.out_shift)] = f"{module.path}.out_shift"
        elif isinstance(module, GatedModule):
            names[id(module.lora_b)] = f"{module.path}.lora_b{TRANSPOSED if isinstance(module, PluginModule) else ''}"
    return {
        name: (names.get(id(parameter), name), parameter.detach())
        for name, parameter in traced.named_parameters(remove_duplicate=False)
    }


def is_shared(plan: GraphPlan) -> bool:
    """Whether all sites of this graph read one row of scalings (G = 1)."""
    scalings = plan.signature.input(SCALINGS)
    return scalings is not None and scalings.shape[2] == 1


def parameter_count(module: nn.Module) -> int:
    """How many numbers a model has, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
