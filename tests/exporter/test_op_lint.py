"""The lint for old TensorRT: every sentence of its table bites, portable graphs pass, what is newer fails by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from exporter.errors import ExportError
from exporter.graph_exports import export_graphs, open_store
from exporter.op_lint import Finding, lint, require_lintable
from exporter.op_restrictions import CHECKS, UNDECIDABLE
from exporter.op_table import operator_table
from exporter.rounding import round_model
from exporter.spec import CacheChoice, DType
from runtime.manifest import Emit, Mode
from tests.exporter.tiny_builds import (
    assert_lints,
    write_checkpoint,
)


def graph(
    nodes: str, inputs: str = "float[2,3] x", weights: str = "", *, opset: int = 20, functions: str = ""
) -> ir.Model:
    """A model, from ONNX's text form."""
    head = f'<ir_version: 9, opset_import: ["": {opset}, "local": 1, "other": 1]>'
    return ir.from_onnx_text(f"{head} tiny ({inputs}) => () <{weights}> {{ {nodes} }} {functions}")


# A sentence of the table: what keeps it, what breaks it; each graph as the arguments of `graph`.
Case = tuple[str, str, tuple[str, ...], tuple[str, ...]]
IMAGE = "float[1,2,8,8] x"
RESIZED = "float[1,2,8,8] x, float[4] s"


def resize(attributes: str) -> tuple[str, ...]:
    return (f"y = Resize <{attributes}> (x, , s)", IMAGE, "float[4] s = {1, 1, 2, 2}")


def axes(operator: str, nodes: str = "") -> Case:
    nodes = nodes or f"y = {operator}(x, a)"
    sentence = "axes must be a constant tensor" if operator == "Unsqueeze" else "axes must be an initializer"
    image = "float[1,2,1] x"
    weights = "int64[1] a = {0}, int64[2] pads = {0, 1}, int64[1] one = {1}"
    computed = f"{image}, int64[1] a"
    return operator, sentence, (nodes, image, weights), (nodes, computed, weights.partition(", ")[2])


def pool(operator: str, sentence: str, good: str, bad: str, image: str = IMAGE) -> Case:
    return operator, sentence, (f"y = {operator} <{good}> (x)", IMAGE), (f"y = {operator} <{bad}> (x)", image)


def recurrent(operator: str, gates: int, activations: str) -> Case:
    sentence = (
        f"For bidirectional {operator}s, activation functions must be the same for both the forward and reverse pass"
    )
    inputs = f"float[5,1,4] x, float[2,{gates * 3},4] w, float[2,{gates * 3},3] r"

    def nodes(forward: str, backward: str) -> str:
        given = f"[{forward}, {backward}]"
        return f'y = {operator} <direction = "bidirectional", hidden_size = 3, activations = {given}> (x, w, r)'

    same = nodes(activations, activations)
    return operator, sentence, (same, inputs), (nodes(activations, activations.replace("Tanh", "Relu")), inputs)


def lstm(sentence: str, attribute: str) -> Case:
    inputs = "float[5,1,4] x, float[1,12,4] w, float[1,12,3] r"
    good, bad = (f"y = LSTM <hidden_size = 3, {attribute} = {value}> (x, w, r)" for value in (0, 1))
    return "LSTM", sentence, (good, inputs), (bad, inputs)


def branches(then: str, other: str) -> tuple[str, ...]:
    return (f"y = If (c) <then_branch = t () => ({then}, else_branch = e () => ({other}>", "float[2,3] x, bool c")


def loop(results: str, carried: str, scans: str = "", *, start: str = "x", value: str = "float[2,3] v") -> str:
    """A loop over one value; `scans` is what its body makes beside it."""
    more = f", {scans}" if scans else ""
    made = "k2 = Identity(k) " + carried + (" scan = Relu(v)" if scans else "")
    return f"{results} = Loop (m, , {start}) <body = b (int64 i, bool k, {value}) => (bool k2, w{more}) {{ {made} }}>"


DEFORM = "float[1,2,8,8] x, float[3,2,3,3] w, float[1,18,{0},{0}] o"
CONSTANT = "sparse_value, value_string, and value_strings attributes are unsupported"
RESIZE_MODES = (
    "Supported resize transformation modes: half_pixel, pytorch_half_pixel, tf_half_pixel_for_nn, asymmetric, "
    "and align_corners"
)
NEAREST_MODES = "Supported nearest modes: floor, ceil, round_prefer_floor, round_prefer_ceil"
ASPECT = "Supported aspect ratio policy: stretch"
IOTA = "When scales is a tensor input, axes must be an iota vector of length rank(input)"
BRANCHES = "Output tensors of the two conditional branches must have the same rank and must have different names"
SCANS = "Scan output length cannot be dynamic"
CARRIED = "The shape of Loop carried dependencies must be the same across all loop iterations"
TRAINING = "is_traning must be an initializer and evaluate to False"
STATIC_AXIS = "axis dimension of input must be a build-time constant"
INDICES = "Indices output tensor unsupported"
DILATIONS = "dilations must be empty or all ones"
K_LIMIT = "K input must be less than 3840"

CASES: list[Case] = [
    *(
        axes(f"Reduce{kind}")
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    ),
    axes("Squeeze"),
    axes("Unsqueeze"),
    axes("Slice", "y = Slice(x, one, one, a)"),
    axes("Pad", "y = Pad(x, pads, , a)"),
    pool("AveragePool", "2D or 3D Pooling only", "kernel_shape = [2, 2]", "kernel_shape = [2]", "float[1,2,8] x"),
    pool("MaxPool", "2D or 3D pooling only", "kernel_shape = [2, 2]", "kernel_shape = [2]", "float[1,2,8] x"),
    *(
        pool(operator, DILATIONS, "kernel_shape=[2,2], dilations=[1,1]", "kernel_shape=[2,2], dilations=[1,2]")
        for operator in ("AveragePool", "LpPool", "MaxPool")
    ),
    ("MaxPool", INDICES, ("y = MaxPool <kernel_shape = [2, 2]> (x)", IMAGE),
     ("y, i = MaxPool <kernel_shape = [2, 2]> (x)", IMAGE)),
    *(
        ("Constant", CONSTANT, ("y = Constant <value_int = 1> ()",), (f"y = Constant <value_int = 1, {name} = 1> ()",))
        for name in ("sparse_value", "value_string", "value_strings")
    ),
    ("CumSum", "axis must be an initializer", ("y = CumSum(x, a)", "float[2,3] x", "int64 a = {1}"),
     ("y = CumSum(x, a)", "float[2,3] x, int64 a")),
    ("DeformConv", "input must have 1D or 2D spatial dimensions",
     ("y = DeformConv <kernel_shape = [3, 3]> (x, w, o)", DEFORM.format(6)),
     ("y = DeformConv <kernel_shape = [1, 1, 1]> (x, w, o)",
      "float[1,2,4,4,4] x, float[3,2,1,1,1] w, float[1,3,4,4,4] o")),
    ("DeformConv", "pads for the beginning and end along each spatial axis must be the same",
     ("y = DeformConv <kernel_shape = [3, 3], pads = [1, 0, 1, 0]> (x, w, o)", DEFORM.format(8)),
     ("y = DeformConv <kernel_shape = [3, 3], pads = [1, 1, 0, 0]> (x, w, o)", DEFORM.format(8))),
    ("DequantizeLinear", "x_zero_point must be zero",
     ("y = DequantizeLinear(q, s, z)", "int8[2] q, float s", "int8 z = {0}"),
     ("y = DequantizeLinear(q, s, z)", "int8[2] q, float s", "int8 z = {3}")),
    ("DequantizeLinear", "x_zero_point must be zero", ("y = DequantizeLinear(q, s)", "int8[2] q, float s"),
     ("y = DequantizeLinear(q, s, z)", "int8[2] q, float s, int8 z")),
    ("QuantizeLinear", "y_zero_point must be 0", ("y = QuantizeLinear(x, s, z)", "float[2] x, float s", "int8 z = {0}"),
     ("y = QuantizeLinear(x, s, z)", "float[2] x, float s", "int8 z = {3}")),
    ("Dropout", TRAINING, ("y = Dropout(x, , t)", "float[2,3] x", "bool t = {0}"),
     ("y = Dropout(x, , t)", "float[2,3] x", "bool t = {1}")),
    ("Dropout", TRAINING, ("y = Dropout(x)",), ("y = Dropout(x, , t)", "float[2,3] x, bool t")),
    ("EyeLike", "input must have static dimensions", ("y = EyeLike(x)",), ("y = EyeLike(x)", "float[B,3] x")),
    ("GridSample", "Input must be 4D input", ("y = GridSample(x, g)", "float[1,2,8,8] x, float[1,4,4,2] g"),
     ("y = GridSample(x, g)", "float[1,2,8,8,8] x, float[1,4,4,4,3] g")),
    recurrent("GRU", 3, '"Sigmoid", "Tanh"'),
    recurrent("LSTM", 4, '"Sigmoid", "Tanh", "Tanh"'),
    recurrent("RNN", 1, '"Tanh"'),
    lstm("input_forget attribute must be 0", "input_forget"),
    lstm("layout attribute must be 0", "layout"),
    ("Hardmax", STATIC_AXIS, ("y = Hardmax(x)", "float[B,3] x"), ("y = Hardmax(x)", "float[2,S] x")),
    ("Hardmax", STATIC_AXIS, ("y = Hardmax <axis = 0> (x)", "float[2,S] x"),
     ("y = Hardmax <axis = 0> (x)", "float[B,3] x")),
    ("If", BRANCHES, branches("a) { a = Abs(x) }", "b) { b = Relu(x) }"),
     branches("a) { a = Abs(x) }", "a) { a = Relu(x) }")),
    ("If", BRANCHES, branches("a) { a = Abs(x) }", "b) { b = Transpose(x) }"),
     branches("a) { a = Abs(x) }", "b) { s = Shape(x) f = Cast <to = 1> (s) b = Abs(f) }")),
    ("LayerNormalization", "Only the first output Y is supported",
     ("y, , = LayerNormalization(x, s)", "float[2,3] x, float[3] s"),
     ("y, m = LayerNormalization(x, s)", "float[2,3] x, float[3] s")),
    ("Loop", SCANS, (loop("y, z", "w = Abs(v)", "scan"), "float[2,3] x", "int64 m = {4}"),
     (loop("y, z", "w = Abs(v)", "scan"), "float[2,3] x, int64 m")),
    ("Loop", SCANS, (loop("y", "w = Abs(v)"), "float[2,3] x, int64 m"),
     (loop("y, z", "w = Abs(v)", "scan").replace("(m, ", "(, "), "float[2,3] x")),
    ("Loop", CARRIED, (loop("y", "w = Abs(v)"), "float[2,3] x, int64 m"),
     (loop("y", "w = Concat <axis = 0> (v, v)"), "float[2,3] x, int64 m")),
    ("Loop", CARRIED, (loop("y", "w = Abs(v)", value="float[N,3] v"), "float[2,3] x, int64 m"),
     (loop("y", "w = Flatten(v)", value="float[2,3,1] v"), "float[2,3,1] x, int64 m")),
    ("Loop", CARRIED, (loop("y", "w = Abs(z)", value="float[N,3] v"), "float[2,3] x, int64 m, float[Z,3] z"),
     (loop("y", "w = Abs(z)", value="float[N,3] v"), "float[2,3] x, int64 m, float[4,3] z")),
    ("Loop", CARRIED, (loop("y", "w = Abs(z)"), "float[B,3] x, int64 m, float[2,3] z"),
     (loop("y", "w = Abs(z)"), "float[B,3] x, int64 m, float[4,3] z")),
    ("OneHot", "depth must be a build-time constant",
     ("y = OneHot(i, d, v)", "int64[2] i, float[2] v", "int64 d = {4}"),
     ("y = OneHot(i, d, v)", "int64[2] i, float[2] v, int64 d")),
    *(
        (operator, "seed value is ignored by TensorRT", (f"y = {operator} <{given}> ({x})",),
         (f"y = {operator} <{given}, seed = 1.0> ({x})",))
        for operator, given, x in (
            ("RandomNormal", "shape = [2]", ""), ("RandomNormalLike", "scale = 2.0", "x"),
            ("RandomUniform", "shape = [2]", ""), ("RandomUniformLike", "high = 2.0", "x"),
        )
    ),
    ("Resize", RESIZE_MODES, resize('mode="linear", coordinate_transformation_mode="align_corners"'),
     resize('mode="linear", coordinate_transformation_mode="half_pixel_symmetric"')),
    ("Resize", "Supported resize modes: nearest, linear", resize('mode = "linear"'), resize('mode = "cubic"')),
    ("Resize", NEAREST_MODES, resize('nearest_mode = "ceil"'), resize('nearest_mode = "floor_ceil"')),
    ("Resize", NEAREST_MODES, resize('mode = "linear", nearest_mode = "floor_ceil"'), resize('nearest_mode = "up"')),
    ("Resize", ASPECT, resize('keep_aspect_ratio_policy = "stretch"'),
     resize('keep_aspect_ratio_policy = "not_larger"')),
    ("Resize", "Antialiasing is not supported", resize("antialias = 0"), resize("antialias = 1")),
    ("Resize", IOTA, ("y = Resize <axes = [0, 1, 2, 3]> (x, , s)", RESIZED),
     ("y = Resize <axes = [2, 3]> (x, , s)", RESIZED)),
    ("Resize", IOTA, ("y = Resize(x, , s)", RESIZED), ("y = Resize <axes = [0, 1, 3, 2]> (x, , s)", RESIZED)),
    ("Resize", IOTA, ("y = Resize <axes = [2, 3]> (x, , s)", IMAGE, "float[2] s = {2, 2}"),
     ("y = Resize <axes = [0, 1, 2]> (x, , s)", RESIZED)),
    ("ScatterND", "reduction is not supported",
     ('y = ScatterND <reduction = "none"> (x, i, u)', "float[4] x, int64[2,1] i, float[2] u"),
     ('y = ScatterND <reduction = "add"> (x, i, u)', "float[4] x, int64[2,1] i, float[2] u")),
    ("TopK", "sorted must be 1", ("y, i = TopK(x, k)", "float[2,3] x", "int64[1] k = {2}"),
     ("y, i = TopK <sorted = 0> (x, k)", "float[2,3] x", "int64[1] k = {2}")),
    ("TopK", K_LIMIT, ("y, i = TopK(x, k)", "float[2,9000] x", "int64[1] k = {3839}"),
     ("y, i = TopK(x, k)", "float[2,9000] x", "int64[1] k = {3840}")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}: {case[1]}")
def test_a_graph_that_keeps_the_sentence_passes_and_one_that_breaks_it_fails(case: Case) -> None:
    operator, sentence, good, bad = case
    assert lint(graph(*good)) == ()
    assert [(finding.operator, finding.reason.partition(":")[0]) for finding in lint(graph(*bad))] == [
        (operator, sentence.partition(":")[0])
    ]


def test_every_sentence_of_the_table_is_a_check_and_has_a_case() -> None:
    rows = operator_table().rows
    wanted = {(row.operator, sentence) for row in rows.values() for sentence in row.restrictions}
    assert {(operator, sentence) for operator, sentence, _, _ in CASES} == wanted
    assert CHECKS.keys() == {sentence for _, sentence in wanted}
    assert UNDECIDABLE.keys() <= CHECKS.keys()


UNDECIDED = {
    "Input must be 4D input": ("r = Reshape(x, n) y = GridSample(r, g)", "float[9] x, int64[N] n, float[1,4,4,2] g"),
    K_LIMIT: ("y, i = TopK(x, k)", "float[2,9000] x, int64[1] k"),
    BRANCHES: ("y = If (c) <then_branch = t () => (a) { a = Abs(x) }, else_branch = e () => (b) { b = Reshape(x, n) }>",
               "float[2,3] x, bool c, int64[N] n"),
    SCANS: (loop("y, z", "w = Abs(v)", "scan").replace("Identity(k)", "Not(k)"), "float[2,3] x", "int64 m = {4}"),
    CARRIED: (loop("y", "w = Concat <axis = 0> (v, v)", value="float[N,3] v"), "float[N,3] x, int64 m"),
    IOTA: ("r = Reshape(x, n) y = Resize <axes = [0, 1]> (r, , s)", "float[9] x, int64[N] n, float[S] s"),
    STATIC_AXIS: ("r = Reshape(x, n) y = Hardmax(r)", "float[9] x, int64[N] n"),
    "input must have 1D or 2D spatial dimensions": (
        "r = Reshape(x, n) y = DeformConv(r, w, o)", f"float[9] x, int64[N] n, {DEFORM.format(6).partition(', ')[2]}"),
    "input must have static dimensions": ("r = Reshape(x, n) y = EyeLike(r)", "float[9] x, int64[N] n"),
}  # fmt: skip


def test_what_only_run_time_shows_is_listed_and_passes() -> None:
    assert UNDECIDED.keys() == UNDECIDABLE.keys()
    for texts in UNDECIDED.values():
        assert lint(graph(*texts)) == ()


def test_constants_may_come_from_nodes_and_older_operators_keep_them_in_attributes() -> None:
    assert lint(graph("a = Constant <value_ints = [0]> () y = ReduceSum(x, a)")) == ()
    assert lint(graph("y = ReduceSum <axes = [0]> (x) z = Squeeze <axes = [0]> (y)", opset=11)) == ()
    computed = "b = Identity(a) y = ReduceSum(x, b)"
    [finding] = lint(graph(computed, weights="int64[1] a = {0}"))
    assert finding.reason == "axes must be an initializer: axes is b, computed or fed at run time"
    assert lint(graph("y, i = TopK <k = 3839> (x)", opset=9)) == ()
    assert [found.reason for found in lint(graph("y, i = TopK <k = 3840> (x)", opset=9))] == [f"{K_LIMIT}: K is 3840"]


def test_activation_parameters_are_part_of_the_function() -> None:
    inputs = "float[5,1,4] x, float[2,3,4] w, float[2,3,3] r"
    both = 'direction = "bidirectional", activations = ["LeakyRelu", "LeakyRelu"], hidden_size = 3'
    for alphas, wanted in (("[0.1, 0.1]", 0), ("[0.1, 0.2]", 1)):
        assert len(lint(graph(f"y = RNN <{both}, activation_alpha = {alphas}> (x, w, r)", inputs))) == wanted


def test_activations_of_one_direction_may_differ() -> None:
    nodes = 'y = GRU <hidden_size = 3, activations = ["Sigmoid", "Tanh"]> (x, w, r)'
    assert lint(graph(nodes, "float[5,1,4] x, float[1,9,4] w, float[1,9,3] r")) == ()


FLOATS = "FP32, FP16, BF16"
TYPES = {
    "double": ("y = Add(x, x)", "double[2] x", ["x is DOUBLE", "x is DOUBLE", "y is DOUBLE"]),
    "products": ("y = MatMul(x, x)", "int64[2,2] x", [f"x is INT64, the table allows {FLOATS}"] * 2 + ["y is INT64"]),
    "inferred": ("i = Cast <to = 7> (x) y = Sqrt(i)", "float[2] x", ["i is INT64", "y is INT64"]),
    "to double": ("y = Cast <to = 11> (x)", "float[2] x", ["y is DOUBLE, the table allows FP32, FP16, "]),
    "exponent": ("y = Pow(x, n)", "float[2] x, int64 n", [f"n is INT64, the table allows {FLOATS}"]),
    "bool equality": (
        "y = Equal(x, x)",
        "bool[2] x",
        [f"x is BOOL, the table allows {FLOATS}, INT32"] * 2,
    ),
    "integer clip": ("y = Clip(x)", "int64[2] x", ["x is INT64", "y is INT64"]),
    "integer sum": ("y = CumSum(x, a)", "int64[2] x", ["x is INT64", "y is INT64"]),
    "which is true": ("y = NonZero(x)", "bool[2] x", ["x is BOOL, the table allows FP32, FP16"]),
    "bytes": ("y = Gather(x, i)", "uint8[2] x, int64[1] i", ["x is UINT8", "y is UINT8"]),
    "quantised": (
        "y = DequantizeLinear(x, s)",
        "uint8[2] x, float s",
        ["x is UINT8, the table allows FP8, INT4"],
    ),
    "a ratio": ("y = Dropout(x, r)", "float[2] x, double r", ["r is DOUBLE"]),
    "no schema": ("y = ScaledTanh(x)", "int64[2] x", ["x is INT64"]),
    "variadic": ("y = Concat <axis = 0> (x, x, z)", "float[2] x, double[2] z", ["z is DOUBLE"]),
}


@pytest.mark.parametrize("case", TYPES)
def test_types_that_the_table_does_not_list_fail(case: str) -> None:
    nodes, inputs, wanted = TYPES[case]
    reasons = [finding.reason for finding in lint(graph(nodes, inputs, "int64 a = {0}"))]
    assert len(reasons) == len(wanted)
    for reason, start in zip(reasons, wanted, strict=True):
        assert reason.startswith(start)


@pytest.mark.parametrize(
    ("nodes", "inputs"),
    [
        ("y = Gather(x, i)", "float[2] x, int32[1] i"),
        ("y = CumSum(x, a)", "float[2] x"),
        ("y = Greater(x, x) z = Where(y, x, x)", "float16[2] x"),
        ("y = ArgMax(x)", "bfloat16[2] x"),
        ("s = Shape(x) y = ConstantOfShape <value = int64[1] {1}> (s)", "bool[2,3] x"),  # INF64 in the table
        ("y = DequantizeLinear(x, s)", "int8[2] x, float s"),
        ("y = IsNaN(x) z = Not(y)", "float[2] x"),
        ("y = Selu(x)", "float[2] x"),
    ],
)
def test_types_beside_the_listed_ones_pass(nodes: str, inputs: str) -> None:
    assert lint(graph(nodes, inputs, "int64 a = {0}")) == ()


def test_operators_that_are_not_in_the_table_or_not_supported_fail_by_name() -> None:
    model = graph("[one] y = Swish(x) [two] z = BitwiseNot(i) [three] k = Unique(x)", "float[2] x, int64[2] i")
    assert lint(model) == (
        Finding("one", "Swish", "the table does not know it"),
        Finding("two", "BitwiseNot", "the table says that it is not supported"),
        Finding("three", "Unique", "the table says that it is not supported"),
    )


def test_an_operator_of_a_later_opset_fails() -> None:
    [finding] = lint(graph("y = Gelu(x)", opset=18))
    assert finding.reason == "ONNX does not have it in opset 18"


def test_a_type_that_is_unknown_is_not_decided() -> None:
    [finding] = lint(graph("[odd] y = other.Thing(x) z = MatMul(y, y)"))
    assert finding == Finding("odd", "Thing", "domain other is not ONNX's, and the model has no such local function")


@pytest.mark.parametrize("opset", [8, 21])
def test_opsets_outside_the_tables_fail(opset: int) -> None:
    assert lint(graph("y = Abs(x)", opset=opset)) == (Finding("tiny", "opset", f"{opset}, the table is about 9 to 20"),)


@pytest.mark.parametrize("opset", [9, 20])
def test_opsets_of_the_table_pass(opset: int) -> None:
    assert lint(graph("y = Abs(x)", opset=opset)) == ()


def test_nodes_of_branches_and_loops_are_looked_at() -> None:
    bad = branches("a) { [inner] a = Swish(x) }", "b) { b = Relu(x) }")
    assert lint(graph(*bad)) == (Finding("inner", "Swish", "the table does not know it"),)
    deep = loop("y", "[inner] w = Swish(v)")
    assert [finding.node for finding in lint(graph(deep, "float[2,3] x, int64 m"))] == ["inner"]


FUNCTION = '<domain: "local", opset_import: ["": 20]> f (u, v) => (r) {{ {} }}'


def test_local_functions_are_looked_into_where_they_are_called() -> None:
    """The same body keeps a sentence with a constant and breaks it with a computed one."""
    body = FUNCTION.format("[sum] r = ReduceSum(u, v)")
    calls = ("float[2,3] x, int64[1] b", "int64[1] a = {0}")
    assert lint(graph("y = local.f(x, a)", *calls, functions=body)) == ()
    [finding] = lint(graph("y = local.f(x, b)", *calls, functions=body))
    assert (finding.node, finding.operator) == ("local::f/sum", "ReduceSum")
    assert finding.reason == "axes must be an initializer: axes is b, computed or fed at run time"
    [finding] = lint(graph("y = local.f(x, a)", *calls, functions=FUNCTION.format("r = Swish(u)")))
    assert (finding.node, finding.operator) == ("local::f/Swish", "Swish")
    assert lint(graph("y = local.g(x, a)", *calls, functions=body))[0].operator == "g"


def test_a_function_that_cannot_be_looked_into_is_a_finding() -> None:
    body = FUNCTION.format("r = Abs(u)").replace("20", "19")
    [finding] = lint(graph("y = local.f(x, x)", functions=body))
    assert (finding.node, finding.operator) == ("tiny", "local functions")
    assert finding.reason.startswith("cannot be looked into: Opset mismatch")


def test_the_model_stays_as_it_is() -> None:
    model = graph("y = local.f(x, x)", functions=FUNCTION.format("r = Swish(u)"))
    before = ir.to_proto(model).SerializeToString()
    assert lint(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_the_error_names_every_operator_and_says_what_it_rests_on() -> None:
    many = " ".join(f"[swish{index}] y{index} = Swish(x)" for index in range(6))
    odd = " ".join(f"[odd{index}] z{index} = other.Odd{index:02}(x)" for index in range(15))
    with pytest.raises(ExportError) as caught:
        require_lintable(graph(f"{odd} {many} [end] e = Abs(q)", "float[2,3] x, double q"), "dynamic")
    text = str(caught.value)
    assert text.startswith("graph dynamic: the graph uses what TensorRT 10.3 may not take; got Abs (e is DOUBLE, ")
    assert "at end; Abs (q is DOUBLE" in text
    assert "and more of Odd10, Odd11, Odd12, Odd13, Odd14, Swish; need" in text
    assert "never run on 10.3" in text
    assert text.endswith("Fix: build with --emit portable, or for a newer TensorRT")
    assert caught.value.code == "E_OPERATOR"
    with pytest.raises(ExportError, match=r"Swish \(.*\) at swish0, swish1, swish2, swish3 and 2 more; need"):
        require_lintable(graph(many), "dynamic")
    require_lintable(graph("y = Abs(x)"), "dynamic")


# test_families.py and test_decoders.py have the portable graphs of all families.


def exported(folder: Path, family: str = "llama", **settings: Any) -> list[ir.Model]:
    """Graphs as a build makes them, not verified; of one block, or two where blocks alternate."""
    checkpoint = write_checkpoint(folder, family, num_hidden_layers=2 if family == "gemma2" else 1)
    spec, parts = checkpoint.spec(**settings), checkpoint.parts()
    if spec.dtype is not DType.FLOAT32:
        round_model(parts.model, getattr(torch, spec.dtype.value))
    return [
        graph.model
        for graph in export_graphs(parts, spec, spec.dtype, open_store(parts, spec, spec.dtype, folder / "graphs"))
    ]


OTHERS: dict[str, dict[str, Any]] = {
    "static": {"modes": (Mode.STATIC,), "mix": {"math": 0.7, "code": 0.3}},
    "without cache": {"cache": CacheChoice.NONE},
    "float16": {"family": "gemma2", "dtype": DType.FLOAT16},
    "bfloat16": {"dtype": DType.BFLOAT16},
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS.keys())
def test_other_portable_graphs_pass(settings: dict[str, Any], tmp_path: Path) -> None:
    [model] = exported(tmp_path, **settings)
    assert_lints(model)


def test_a_modern_graph_fails_by_the_names_of_its_operators(tmp_path: Path) -> None:
    [model] = exported(tmp_path, emit=Emit.MODERN)
    operators = {finding.operator for finding in lint(model)}
    assert operators == {"opset", "Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
    nodes = [node.name for node in model.graph if node.op_type == "Attention"]
    assert [finding.node for finding in lint(model) if finding.operator == "Attention"] == nodes
    with pytest.raises(ExportError, match=r"graph dynamic: .* got Attention \(the table does not know it\) at "):
        require_lintable(model, "dynamic")
