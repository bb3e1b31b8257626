"""The operators as local functions in ONNX Runtime, against their reference and the exporter's gate."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from exporter.gate import Gate
from exporter.op_lint import lint
from exporter.plugin_nodes import rules_of
from plugins.fallback import ELEMENT_TYPES, gate_scalings_function, gated_low_rank_function
from plugins.operators import DOMAIN, GATE_SCALINGS, GATED_LOW_RANK, GateRules
from plugins.reference import gate_scalings, gated_low_rank
from tests.exporter.test_gate import config
from tests.gate_rows import Rows, logits
from tests.plugins.test_kernels import NUMPY, RULES, ULP, all_but_equal, operands, split

Array = NDArray[Any]


def gate_model(rules: GateRules, experts: int, dtype: str = "float32", opset: int = 18) -> onnx.ModelProto:
    node = helper.make_node(GATE_SCALINGS, ["logits"], ["scalings"], domain=DOMAIN, **rules.attributes())
    values = [
        helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], ["N", experts]) for name in ("logits", "scalings")
    ]
    return model_of(node, values[:1], values[1:], gate_scalings_function(rules, experts, dtype, opset), opset)


def model_of(node: Any, inputs: Any, outputs: Any, function: onnx.FunctionProto, opset: int) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "graph", inputs, outputs)
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [result] = session.run(None, feeds)
    return np.asarray(result)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=logits(), rules=st.sampled_from(RULES))
def test_gate_function_is_the_reference(rows: Rows, rules: GateRules) -> None:
    rules = GateRules(rules.softmax, rules.temperature, min(rules.top_k, rows.shape[1]), rules.topk_softmax)
    expected, got = gate_scalings(rows, rules), run(gate_model(rules, rows.shape[1]), {"logits": rows})
    same = split(got, expected)
    assert same.all() or (rules.top_k and all_but_equal(rows, rules)[~same].all())
    assert (np.abs(got[same] - expected[same]) <= 1e-6 * np.maximum(1, np.abs(expected[same]))).all()


@pytest.mark.parametrize("opset", [18, 24])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_gate_function_in_half_precision_and_both_opsets(rules: GateRules, opset: int) -> None:
    rows = np.random.default_rng(1).normal(0, 2, (50, 7)).astype(np.float16)
    got = run(gate_model(rules, 7, "float16", opset), {"logits": rows}).astype(np.float32)
    expected = gate_scalings(rows, rules).astype(np.float32)
    assert (np.abs(got - expected) <= ULP["float16"] * np.maximum(np.abs(expected), 2.0**-14)).all()


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_old_tensorrt_takes_the_body(rules: GateRules) -> None:
    """What builds without the plugin is linted like any graph, call by call."""
    assert not lint(ir.serde.deserialize_model(gate_model(rules, 5)))


def test_the_reference_has_the_exporters_rules() -> None:
    rows = np.random.default_rng(4).normal(0, 3, (500, 6)).astype(np.float32)
    for rules in RULES:
        gate = config(
            6, softmax=rules.softmax, temperature=rules.temperature, top_k=rules.top_k or None,
            softmax_topk=rules.topk_softmax,
        )  # fmt: skip
        assert rules_of(gate) == rules == GateRules.of(rules.attributes())
        with torch.no_grad():
            theirs = Gate(gate, 6)(torch.from_numpy(rows)[None])[0, :, 0].numpy()
        assert np.abs(gate_scalings(rows, rules) - theirs).max() <= 1e-6


def test_equal_values_stay_by_lower_expert() -> None:
    rules = GateRules(softmax=False, temperature=1.0, top_k=2, topk_softmax=False)
    rows = np.array([[1, 2, 2, 2], [5, 5, 5, 5], [0, -1, 0, 0]], np.float32)
    expected = [[0, 2, 2, 0], [5, 5, 0, 0], [0, 0, 0, 0]]
    assert gate_scalings(rows, rules).tolist() == expected
    assert run(gate_model(rules, 4), {"logits": rows}).tolist() == expected


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_low_rank_function_is_the_reference(dtype: str) -> None:
    made = operands(5, 12, 40, 24, dtype)
    node = helper.make_node(GATED_LOW_RANK, ["base", "x", "a", "b", "factors"], ["y"], domain=DOMAIN)
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(made[key].dtype), list(made[key].shape))
        for name, key in [*((name, name) for name in node.input), ("y", "base")]
    ]
    model = model_of(node, values[:-1], values[-1:], gated_low_rank_function(dtype, 18), 18)
    assert not lint(ir.serde.deserialize_model(model))
    got = run(model, made).astype(np.float64)
    wide = {name: array.astype(np.float64) for name, array in made.items()}
    expected = gated_low_rank(**wide)
    limit = {"float32": 1e-4, "float16": 0.2}[dtype]  # the body rounds each product to the graph's dtype
    assert np.abs(got - expected).max() <= limit
    without = dict(wide, factors=np.where(np.arange(12) < 4, 0, wide["factors"]))
    assert np.abs(gated_low_rank(**without) - expected).max() > 10 * limit, "losing four columns shows"


def test_dtypes_of_the_room() -> None:
    assert NUMPY["bfloat16"] is ml_dtypes.bfloat16
    assert set(NUMPY) == set(ELEMENT_TYPES)
