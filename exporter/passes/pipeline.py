"""The passes of a trace and of each form that a graph is written in, as literal lists."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common

from exporter.passes.attach_functions import AttachFunctionsPass
from exporter.passes.convert_opset import ConvertOpsetPass
from exporter.passes.fold_shapes import FoldShapesPass
from exporter.passes.fuse_modern import FuseModernPass
from exporter.passes.fuse_onnxruntime import FuseOnnxRuntimePass
from exporter.passes.instantiate_blocks import InstantiateBlocksPass
from exporter.passes.lower_attention import LowerAttentionPass
from exporter.passes.name_weights import NameWeightsPass
from exporter.passes.simplify import SimplifyPass
from exporter.passes.transpose_weights import TransposeWeightsPass
from runtime.manifest import Emit
from runtime.signature import Signature

OPSETS = {Emit.PORTABLE: 18, Emit.MODERN: 24}


def clean_trace(
    model: ir.Model,
    weight_names: Mapping[str, str],
    transposes: Mapping[str, str],
    blocks: InstantiateBlocksPass | None = None,
) -> ir.Model:
    """Rewrite a fresh trace in place into what all forms of the graph are made of; attention is still one node.

    `weight_names`: traced name -> ours; `transposes`: our name -> the one of its transpose, where there may be one.
    `blocks`: makes the whole graph of a trace in which one block stands for all of its kind.
    """
    weights = frozenset(weight_names.values())
    return _run(
        model,
        NameWeightsPass(weight_names),
        FoldShapesPass(weights),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        SimplifyPass(),
        FoldShapesPass(weights),
        common.RemoveUnusedNodesPass(),
        TransposeWeightsPass(transposes),
        *([blocks, common.CommonSubexpressionEliminationPass()] if blocks else []),
    )


def write_form(model: ir.Model, emit: Emit, opset: int, signature: Signature) -> ir.Model:
    """Rewrite a clean trace in place into the operators of `emit`, with caches as the signature has them."""
    return _run(
        model,
        *([ConvertOpsetPass(opset)] if opset > OPSETS[Emit.PORTABLE] else []),
        *([FuseModernPass()] if emit is Emit.MODERN else []),
        LowerAttentionPass(signature),
        *_ending(),
    )


def write_onnxruntime_form(model: ir.Model, signature: Signature) -> ir.Model:
    """The same for ONNX Runtime's CPU provider only: opset 24 and its own fusions."""
    return _run(
        model,
        ConvertOpsetPass(OPSETS[Emit.MODERN]),
        FuseOnnxRuntimePass(),
        LowerAttentionPass(signature),
        *_ending(),
    )


def _ending() -> list[ir.passes.InPlacePass]:
    return [
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        AttachFunctionsPass(),
        common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),  # source paths and stack traces
        common.NameFixPass(),
    ]


def _run(model: ir.Model, *passes: ir.passes.InPlacePass) -> ir.Model:
    for step in passes:
        step(model)
    return model
