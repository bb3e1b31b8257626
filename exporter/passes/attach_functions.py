"""Give every operator of ours its meaning in plain ONNX: what runs wherever the plugin does not."""

from __future__ import annotations

import onnx_ir as ir

from plugins.fallback import gate_scalings_function, gated_low_rank_function
from plugins.operators import DOMAIN, GATE_SCALINGS, GateRules


class AttachFunctionsPass(ir.passes.InPlacePass):
    """Add one local function for each operator of our domain that the graph uses; all nodes of one are alike."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = {node.op_type: node for node in model.graph.all_nodes() if node.domain == DOMAIN}
        for node in found.values():
            function = _function(node, model.opset_imports[""])
            model.functions[function.identifier()] = function
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(found))


def _function(node: ir.Node, opset: int) -> ir.Function:
    like, attributes = node.inputs[0], node.attributes
    assert like is not None
    assert like.dtype is not None
    dtype = {"FLOAT": "float32"}.get(like.dtype.name, like.dtype.name.lower())
    if node.op_type != GATE_SCALINGS:
        proto = gated_low_rank_function(dtype, opset)
    else:
        assert like.shape is not None
        rules = GateRules.of({name: attribute.value for name, attribute in attributes.items()})
        experts = like.shape[-1]
        assert isinstance(experts, int)
        proto = gate_scalings_function(rules, experts, dtype, opset)
    proto.attribute.extend(name for name in attributes if name not in proto.attribute)
    return ir.serde.deserialize_function(proto)
