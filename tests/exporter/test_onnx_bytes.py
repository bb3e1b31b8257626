"""Functions cut out of a model as bytes: what onnx itself would give, and plain refusals of everything else."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from exporter.engines.onnx_bytes import with_sizes, without_functions
from plugins.fallback import gate_scalings_function, gated_low_rank_function
from plugins.operators import DOMAIN, GATE_SCALINGS, GATED_LOW_RANK, GateRules
from runtime.signature import CacheStyle, SignatureShape, signature_from_shape


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    rules = GateRules(softmax=True, temperature=1.0, top_k=1, topk_softmax=False)
    functions = [gate_scalings_function(rules, 3, "float32", 18), gated_low_rank_function("float32", 18)]
    graph = helper.make_graph(
        [helper.make_node(GATE_SCALINGS, ["x"], ["y"], domain=DOMAIN, **rules.attributes())], "g",
        [helper.make_tensor_value_info("x", 1, ["N", 3])], [helper.make_tensor_value_info("y", 1, ["N", 3])],
        [onnx.numpy_helper.from_array(np.ones(5000, np.float32), "unused")],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, functions=functions, opset_imports=imports, producer_name="x" * 300)


@pytest.mark.parametrize("names", [(), (GATE_SCALINGS,), (GATED_LOW_RANK,), (GATE_SCALINGS, GATED_LOW_RANK)])
def test_only_the_named_functions_go(model: onnx.ModelProto, names: tuple[str, ...]) -> None:
    expected = onnx.ModelProto()
    expected.CopyFrom(model)
    kept = [function for function in model.functions if function.name not in names]
    del expected.functions[:]
    expected.functions.extend(kept)
    assert onnx.load_from_string(without_functions(model.SerializeToString(), names)) == expected


def test_symbols_become_numbers_everywhere_and_nothing_else_changes() -> None:
    spec = SignatureShape(50, (2, 4), (8, 8), scalings=3, experts=2, gate=True, cache=CacheStyle.ALIAS)
    signature = signature_from_shape(spec)
    kinds = {"float32": 1, "int64": 7}
    values = [
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in side]
        for side in (signature.inputs, signature.outputs)
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", *values)
    model = helper.make_model(graph)
    model.graph.value_info.append(helper.make_tensor_value_info("inner", 1, ["B", "C", 3]))
    got = onnx.load_from_string(with_sizes(model.SerializeToString(), {"C": 100_000}))
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "C":
                dimension.dim_value = 100_000
    assert got == model
    assert "100000" in str(got)
    assert with_sizes(model.SerializeToString(), {}) == model.SerializeToString()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_bytes_come_back_or_are_refused(data: bytes) -> None:
    with suppress(ValueError):
        assert without_functions(data, ()) == data


def test_a_truncated_model_is_refused(model: onnx.ModelProto) -> None:
    data = model.SerializeToString()
    for stop in range(len(data) - 1, 0, -max(1, len(data) // 200)):
        try:
            shorter = without_functions(data[:stop], ())
        except ValueError:
            continue
        assert shorter == data[:stop], "a cut between two fields leaves a message"
