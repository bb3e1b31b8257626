"""A newer opset for a graph that was traced in an older one."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import version_converter


class ConvertOpsetPass(ir.passes.InPlacePass):
    """onnxscript's version converter; nodes of other domains stay as they are."""

    def __init__(self, opset: int) -> None:
        super().__init__()
        self.opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        version_converter.convert_version(model, self.opset)
        return ir.passes.PassResult(model, modified=True)
