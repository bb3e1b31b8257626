"""Fold what is constant in shape arithmetic, but never a weight: what is made of it would be a second copy on disk."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnxscript.optimizer


class FoldShapesPass(ir.passes.InPlacePass):
    """onnxscript's constant folding, with `weights` left where they are and none merged with an equal one.

    A static graph's changed weights get their values after the passes: a fold would keep the base's.
    """

    def __init__(self, weights: Collection[str]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = onnxscript.optimizer.fold_constants_ir(model, should_fold=self._may_fold)
        return ir.passes.PassResult(model, modified=result.modified)

    def _may_fold(self, node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in self.weights for value in node.inputs) else None
