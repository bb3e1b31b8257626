"""onnxscript's default algebraic rewrites: no-op slices, redundant casts, reshape chains."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.rewriter


class SimplifyPass(ir.passes.InPlacePass):
    """Apply the rules; none of them touches a weight."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        onnxscript.rewriter.rewrite(model)
        return ir.passes.PassResult(model, modified=True)
