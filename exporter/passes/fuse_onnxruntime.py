"""ONNX Runtime's own operators in place of ONNX's, where its CPU provider is faster with them."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import (
    fuse_skip_layer_normalization,
    fuse_skip_rms_normalization,
)
from onnxscript.rewriter.rules.fusion._rotary_embedding import fuse_partial_rotary_embedding, fuse_rotary_embedding

FUSIONS = (
    fuse_rms_normalization,
    fuse_skip_rms_normalization,  # a residual sum and the norm of it
    fuse_skip_layer_normalization,
    fuse_rotary_embedding,
    fuse_partial_rotary_embedding,
)


class FuseOnnxRuntimePass(ir.passes.InPlacePass):
    """onnxscript's fusion rules for ONNX Runtime, on a graph of opset 23 or later. What fits none stays as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        count = sum(fuse(model) for fuse in FUSIONS)
        return ir.passes.PassResult(model, modified=bool(count))
