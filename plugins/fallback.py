"""The operators as ONNX local functions, for every engine without our plugins. Needs onnx: the exporter's side."""

from __future__ import annotations

import onnx

from plugins.operators import DOMAIN, GATE_SCALINGS, GATED_LOW_RANK, GateRules

ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}  # TensorProto
LOWEST, TINY = -3.4028234663852886e38, 1.1754943508222875e-38


def gate_scalings_function(rules: GateRules, experts: int, dtype: str, opset: int) -> onnx.FunctionProto:
    """GateScalings for these rules; the attributes stand on the node for the plugin, the body has them built in.

    Experts are kept by comparing places and not by a threshold: of two equal ones only the lower may stay.
    """
    lines = ["x0 = Cast <to = 1> (logits)"]
    if rules.softmax:
        lines += [
            f"temperature = {_float(rules.temperature)}",
            "tempered = Div (x0, temperature)",
            "x1 = Softmax <axis = -1> (tempered)",
        ]
    else:
        lines += ["x1 = Identity (x0)"]
    if rules.top_k:
        lines += [
            f"k = Constant <value = int64[1] {{{rules.top_k}}}> ()",
            "top, places = TopK <axis = -1, largest = 1, sorted = 1> (x1, k)",
            "last = Constant <value = int64[1] {-1}> ()",
            "chosen = Unsqueeze (places, last)",
            f"experts = Constant <value = int64[{experts}] {{{', '.join(map(str, range(experts)))}}}> ()",
            "is_chosen = Equal (chosen, experts)",
            "counted = Cast <to = 1> (is_chosen)",
            "before = Constant <value = int64[1] {-2}> ()",
            "kept = ReduceMax <keepdims = 0> (counted, before)",
            "x2 = Mul (x1, kept)",
        ]
    else:
        lines += ["x2 = Identity (x1)"]
    if rules.topk_softmax:
        lines += [
            f"zero = {_float(0)}",
            "is_zero = Equal (x2, zero)",
            f"lowest = {_float(LOWEST)}",
            "masked = Where (is_zero, lowest, x2)",
            "axis = Constant <value = int64[1] {-1}> ()",
            "highest = ReduceMax <keepdims = 1> (masked, axis)",
            "apart = Sub (masked, highest)",
            "raised = Exp (apart)",
            "exp = Where (is_zero, zero, raised)",
            "total = ReduceSum <keepdims = 1> (exp, axis)",
            f"tiny = {_float(TINY)}",
            "divisor = Max (total, tiny)",
            "x3 = Div (exp, divisor)",
        ]
    else:
        lines += ["x3 = Identity (x2)"]
    lines += [f"scalings = Cast <to = {ELEMENT_TYPES[dtype]}> (x3)"]
    names = ", ".join(rules.attributes())
    return _function(f"{GATE_SCALINGS} <{names}> (logits) => (scalings)", lines, opset)


def gated_low_rank_function(dtype: str, opset: int) -> onnx.FunctionProto:
    """GatedLowRank in products of the graph's dtype, as the exporter's plain graphs have it."""
    lines = [
        "down = Transpose <perm = [1, 0]> (a)",
        "hidden = MatMul (x, down)",
        f"typed = Cast <to = {ELEMENT_TYPES[dtype]}> (factors)",
        "gated = Mul (hidden, typed)",
        "update = MatMul (gated, b)",
        "y = Add (base, update)",
    ]
    return _function(f"{GATED_LOW_RANK} (base, x, a, b, factors) => (y)", lines, opset)


def _float(value: float) -> str:
    return f"Constant <value = float {{{value!r}}}> ()"


def _function(head: str, lines: list[str], opset: int) -> onnx.FunctionProto:
    body = "\n".join(lines)
    return onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{head}\n{{\n{body}\n}}')
