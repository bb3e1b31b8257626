"""Opset-24 operators in place of their decompositions: RMSNormalization and RotaryEmbedding, wherever the pattern fits.

Attention and TensorScatter come from the trace itself (exporter/attention.py). What does not fit stays decomposed.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.rules.fusion._rotary_embedding import fuse_partial_rotary_embedding, fuse_rotary_embedding


class FuseModernPass(ir.passes.InPlacePass):
    """onnxscript's fusion rules for opset 23 and later. Requires that opset."""

    def requires(self, model: ir.Model) -> None:
        if model.opset_imports.get("", 0) < 23:
            raise ir.passes.PreconditionError("RMSNormalization and RotaryEmbedding need opset 23")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        count = sum(fuse(model) for fuse in (fuse_rms_normalization, fuse_rotary_embedding))
        count += fuse_partial_rotary_embedding(model)
        return ir.passes.PassResult(model, modified=bool(count))
