"""Opset-24 operators in place of their decompositions: RMSNormalization and RotaryEmbedding, wherever the pattern fits.

Attention and TensorScatter come from the trace itself (exporter/attention.py). What does not fit stays decomposed.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.rules.fusion._rotary_embedding import (
    RotaryEmbedding23Fusion,
    _rotate_half_pattern,
    fuse_partial_rotary_embedding,
    fuse_rotary_embedding,
)


class HalfRotaryFusion(RotaryEmbedding23Fusion):
    """The same for fp16 and bf16, where transformers computes the angles in fp32 and rounds cosine and sine."""

    def pattern(
        self, op: Any, x: Any, freqs: Any, start1: Any, end1: Any, start2: Any, end2: Any, one1: Any, one2: Any, to: Any
    ) -> Any:
        repeated = op.Concat(freqs, freqs, axis=-1)
        cos = op.Unsqueeze(op.Cast(op.Cos(repeated), to=to), one1)
        sin = op.Unsqueeze(op.Cast(op.Sin(repeated), to=to), one2)
        return x * cos + _rotate_half_pattern(op, x, start1, end1, start2, end2) * sin

    def rewrite(self, op: Any, x: Any, freqs: Any, to: Any, **_: Any) -> Any:
        cos, sin = op.Cast(op.Cos(freqs), to=to), op.Cast(op.Sin(freqs), to=to)
        return op.RotaryEmbedding(x, cos, sin, interleaved=0, num_heads=x.shape[1])


class FuseModernPass(ir.passes.InPlacePass):
    """onnxscript's fusion rules for opset 23 and later. Requires that opset."""

    def requires(self, model: ir.Model) -> None:
        if model.opset_imports.get("", 0) < 23:
            raise ir.passes.PreconditionError("RMSNormalization and RotaryEmbedding need opset 23")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        count = sum(fuse(model) for fuse in (fuse_rms_normalization, fuse_rotary_embedding))
        count += RewriteRuleSet([HalfRotaryFusion.rule()]).apply_to_model(model)
        count += fuse_partial_rotary_embedding(model)
        return ir.passes.PassResult(model, modified=bool(count))
