"""Fold what is constant in shape arithmetic, but never a weight: its transpose would be a second copy on disk."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer


class FoldShapesPass(ir.passes.InPlacePass):
    """onnxscript's constant folding, with weights left where they are and none merged with an equal one."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = onnxscript.optimizer.fold_constants_ir(model, should_fold=_may_fold)
        return ir.passes.PassResult(model, modified=result.modified)


def _may_fold(node: ir.Node) -> bool | None:
    return False if node.op_type == "Transpose" else None
