"""The passes of each emit profile, as literal lists."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common

from exporter.passes.attach_functions import AttachFunctionsPass
from exporter.passes.fold_shapes import FoldShapesPass
from exporter.passes.fuse_modern import FuseModernPass
from exporter.passes.instantiate_blocks import InstantiateBlocksPass
from exporter.passes.name_weights import NameWeightsPass
from exporter.passes.simplify import SimplifyPass
from exporter.passes.transpose_weights import TransposeWeightsPass
from runtime.manifest import Emit


def run_passes(
    model: ir.Model,
    weight_names: Mapping[str, str],
    transposes: Mapping[str, str],
    emit: Emit,
    blocks: InstantiateBlocksPass | None = None,
) -> ir.Model:
    """Rewrite a fresh trace in place into what the bundle holds.

    `weight_names`: traced name -> ours; `transposes`: our name -> the one of its transpose, where there may be one.
    `blocks`: makes the whole graph of a trace in which one block stands for all of its kind.
    """
    weights = frozenset(weight_names.values())
    passes: list[ir.passes.InPlacePass] = [
        NameWeightsPass(weight_names),
        FoldShapesPass(weights),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        SimplifyPass(),
        FoldShapesPass(weights),
        *([FuseModernPass(), common.CommonSubexpressionEliminationPass()] if emit is Emit.MODERN else []),
        common.RemoveUnusedNodesPass(),
        TransposeWeightsPass(transposes),
        *([blocks, common.CommonSubexpressionEliminationPass()] if blocks else []),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        AttachFunctionsPass(),
        common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),  # source paths and stack traces
        common.NameFixPass(),
    ]
    for step in passes:
        step(model)
    return model
