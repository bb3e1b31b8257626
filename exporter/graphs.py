"""One graph of a bundle: traced, rewritten, its weights put into the store, saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from exporter.dynamic import LORA_LEAVES, GatedModule, TracedModel, traced_model
from exporter.errors import ExportError
from exporter.gate import Gate
from exporter.passes.pipeline import run_passes
from exporter.sites import Site
from exporter.store import Weight, WeightStore, weight_from_tensor
from exporter.trace import trace
from runtime.errors import UserError
from runtime.manifest import Emit, GraphInfo
from runtime.signature import SCALINGS, Signature

OPSETS = {Emit.PORTABLE: 18, Emit.MODERN: 24}


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """What one graph is made of; a static graph has no sites and no gate.

    `changed`, for static only: parameter name -> name of the stored tensor that stands in its place.
    """

    name: str
    signature: Signature
    emit: Emit
    sites: Sequence[Site] = ()
    gate: Gate | None = None
    changed: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """A graph that lies in its store's root."""

    info: GraphInfo
    model: ir.Model
    store: WeightStore


def export_graph(model: PreTrainedModel, plan: GraphPlan, store: WeightStore) -> ir.Model:
    """Trace, rewrite, store the weights that are not yet there, save NAME.onnx under the store's root."""
    base_names = {id(parameter): name for name, parameter in model.named_parameters()}
    with traced_model(model, plan.sites, plan.gate, plan.signature.cache_style, shared=is_shared(plan)) as traced:
        weights = named_weights(base_names, traced)
        try:
            graph = trace(traced, plan.signature, OPSETS[plan.emit])
        except UserError:
            raise
        except Exception as error:
            raise ExportError(
                f"this {model.config.model_type} model cannot be traced as it is",
                where=f"graph {plan.name}",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}",
                fix="families proved to work are listed in the README",
            ) from error
    run_passes(graph, {traced_name: name for traced_name, (name, _) in weights.items()}, plan.emit)
    present = {name: tensor for name, tensor in weights.values() if name in graph.graph.initializers}
    _store(present, plan, store)
    _point_into_store(graph, present, plan.changed or {}, store)
    graph.graph.name = plan.name
    ir.save(graph, store.root / f"{plan.name}.onnx")
    return graph


def named_weights(base_names: Mapping[int, str], traced: TracedModel) -> dict[str, tuple[str, torch.Tensor]]:
    """Traced name -> (our name, tensor): checkpoint names for the base, SITE.lora_*, columns.* and gate.* for the rest.

    `base_names` maps parameter identity to its name in the plain model; a tied weight is one under its first name.
    """
    names = dict(base_names)
    for module in traced.modules():
        if isinstance(module, GatedModule):
            names |= {id(getattr(module, leaf)): f"{module.path}.{leaf}" for leaf in LORA_LEAVES}
    return {
        name: (names.get(id(parameter), name), parameter.detach())
        for name, parameter in traced.named_parameters(remove_duplicate=False)
    }


def is_shared(plan: GraphPlan) -> bool:
    """Whether all sites of this graph read one row of scalings (G = 1)."""
    scalings = plan.signature.input(SCALINGS)
    return scalings is not None and scalings.shape[2] == 1


def _store(present: Mapping[str, torch.Tensor], plan: GraphPlan, store: WeightStore) -> None:
    changed = plan.changed or {}
    own = {f"{site.path}.{leaf}" for site in plan.sites for leaf in LORA_LEAVES}
    base: list[Weight] = []
    adapters: list[Weight] = []
    for name, tensor in present.items():
        if name not in changed:
            (adapters if name in own or name.startswith(("gate.", "columns.")) else base).append(
                weight_from_tensor(name, tensor)
            )
    store.write("base", base)
    store.write("adapters", adapters)


def _point_into_store(graph: ir.Model, names: Iterable[str], changed: Mapping[str, str], store: WeightStore) -> None:
    for name in names:
        value = graph.graph.initializers[name]
        value.const_value = store.external(changed.get(name, name))
        value.const_value.name = name


def parameter_count(module: nn.Module) -> int:
    """How many numbers a model has, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
