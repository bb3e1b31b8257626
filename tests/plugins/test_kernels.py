"""The kernels against their reference in numpy, run by Triton's interpreter on the CPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from plugins.launches import gate_launches, low_rank_launches
from plugins.operators import GateRules
from plugins.reference import gate_scalings, gated_low_rank
from tests.gate_rows import HUGE, ROWS, Rows, logits
from tests.plugins.interpreter import Interpreter

Array = NDArray[Any]
NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# One rounding at the end, in units of the value: an answer next to the right one.
ULP = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FP32_LIMIT = 1e-6
UNTOUCHED = 7.0  # what stands in the output before a kernel writes it
RULES = [
    GateRules(softmax, temperature, top_k, topk_softmax)
    for softmax, temperature in ((True, 1.0), (True, 0.3), (False, 1.0))
    for top_k in (0, 1, 3)
    for topk_softmax in (False, True)
]


def run_gate(interpreter: Interpreter, rows: Array, dtype: str, rules: GateRules) -> Array:
    tensors = {"logits": rows, "scalings": np.full_like(rows, UNTOUCHED)}
    return interpreter.run(gate_launches(rows.shape, dtype, rules), tensors)["scalings"]


def split(got: Array, expected: Array) -> Array:
    """[rows]: whether both sides kept the same experts."""
    same: Array = ((got != 0) == (expected != 0)).all(-1)
    return same


def all_but_equal(rows: Array, rules: GateRules) -> Array:
    """[rows]: whether the last that stays and the first that goes are equal to within rounding: either may stay."""
    dense = np.sort(gate_scalings(rows.astype(np.float32), GateRules(rules.softmax, rules.temperature, 0, False)), -1)
    k = min(rules.top_k, rows.shape[-1] - 1)
    last, first = dense[:, -k], dense[:, -k - 1]
    equal: Array = (last - first) <= 4 * np.spacing(np.abs(last))
    return equal


@settings(max_examples=130, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=logits(), rules=st.sampled_from(RULES), data=st.data())
@example(rows=np.full((ROWS, 64), HUGE, np.float32), rules=RULES[3], data=None)
@example(rows=np.zeros((ROWS, 33), np.float32), rules=GateRules(False, 1.0, 2, True), data=None)
def test_gate_kernel_is_the_reference(interpreter: Interpreter, rows: Rows, rules: GateRules, data: Any) -> None:
    """130 examples of 40 rows: 5,200, in float32."""
    both = np.concatenate([rows, np.random.default_rng(rows.shape[1]).normal(0, 3, rows.shape).astype(np.float32)])
    expected, got = gate_scalings(both, rules), run_gate(interpreter, both, "float32", rules)
    same = split(got, expected)
    assert same.all() or (rules.top_k and all_but_equal(both, rules)[~same].all())
    limit = FP32_LIMIT * np.maximum(1, np.abs(expected[same]))
    assert (np.abs(got[same] - expected[same]) <= limit).all()
    assert same[ROWS:].all(), "ordinary rows leave no doubt"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_gate_kernel_rounds_once(interpreter: Interpreter, rules: GateRules, dtype: str) -> None:
    generator = np.random.default_rng(1)
    for experts in (1, 2, 5, 8, 31, 64):
        rows = generator.normal(0, 2, (60, experts)).astype(NUMPY[dtype])
        rows[3], rows[4] = 0, rows[4, 0]
        expected = gate_scalings(rows, rules).astype(np.float32)
        got = run_gate(interpreter, rows, dtype, rules).astype(np.float32)
        assert split(got, expected).all()
        assert (np.abs(got - expected) <= ULP[dtype] * np.maximum(np.abs(expected), 2.0**-14)).all()


def test_gate_rows_that_hold_nan_never_look_healthy(interpreter: Interpreter) -> None:
    rows = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
    rows[1, 3], rows[4, 0] = np.nan, np.nan
    for rules in RULES:
        got = run_gate(interpreter, rows, "float32", rules)
        assert np.isnan(got).any(-1).tolist() == [False, True, False, False, True, False], rules
        assert np.array_equal(got[[0, 2, 3, 5]], run_gate(interpreter, rows[[0, 2, 3, 5]], "float32", rules))


def test_gate_of_leading_axes_and_of_nothing(interpreter: Interpreter) -> None:
    rows = np.random.default_rng(3).normal(size=(2, 3, 4, 5)).astype(np.float32)
    expected = gate_scalings(rows, RULES[3])
    assert np.abs(run_gate(interpreter, rows, "float32", RULES[3]) - expected).max() <= FP32_LIMIT
    assert gate_launches((2, 0, 4, 5), "float32", RULES[3]) == ()


# --- the low-rank update ---

SHAPES = [  # tokens, ranks, in, out: one token and few, tiles, widths that no block divides
    (1, 8, 64, 48), (1, 1, 7, 5), (3, 20, 96, 33), (15, 33, 520, 256),
    (16, 64, 128, 256), (17, 20, 96, 33), (70, 5, 31, 200),
]  # fmt: skip


def operands(tokens: int, ranks: int, inputs: int, outputs: int, dtype: str) -> dict[str, Array]:
    generator = np.random.default_rng(tokens * ranks)
    shapes = {"base": (tokens, outputs), "x": (tokens, inputs), "a": (ranks, inputs), "b": (ranks, outputs)}
    made = {name: generator.normal(size=shape).astype(NUMPY[dtype]) for name, shape in shapes.items()}
    factors = generator.normal(size=(tokens, ranks)).astype(np.float32)
    factors[generator.random(factors.shape) < 0.5] = 0
    return made | {"factors": factors}


def run_low_rank(interpreter: Interpreter, made: dict[str, Array], dtype: str) -> Array:
    ranks, width = made["b"].shape
    scratch = {"hidden": np.full(made["factors"].shape, np.nan, np.float32), "y": np.full_like(made["base"], np.nan)}
    launches = low_rank_launches(made["x"].shape, ranks, width, dtype)
    return interpreter.run(launches, made | scratch)["y"]


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_kernels_are_the_reference(interpreter: Interpreter, shape: tuple[int, ...], dtype: str) -> None:
    tokens, ranks, inputs, outputs = shape
    made = operands(tokens, ranks, inputs, outputs, dtype)
    wide = {name: array.astype(np.float64) for name, array in made.items()}
    expected = gated_low_rank(**wide)
    got = run_low_rank(interpreter, made, dtype).astype(np.float64)
    # fp32 sums of in + R terms, then one rounding to the dtype
    sizes = {name: np.abs(array) for name, array in wide.items()}
    noise = 2.0**-22 * np.sqrt(inputs + ranks) * gated_low_rank(**sizes)
    assert (np.abs(got - expected) <= noise + ULP[dtype] * np.abs(expected)).all()
    update = np.abs(expected - wide["base"]).max()
    assert update == 0 or update > 100 * noise.max(), "the update is far above the tolerance"


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_experts_that_no_token_selected_are_not_read(interpreter: Interpreter, tokens: int) -> None:
    """Their a and b hold NaN: one read and the answer shows it."""
    made = operands(tokens, 48, 64, 96, "float32")
    made["factors"][:, 16:32] = 0
    expected = run_low_rank(interpreter, made, "float32")
    made["a"][16:32] = np.nan
    made["b"][16:32] = np.nan
    assert np.array_equal(run_low_rank(interpreter, made, "float32"), expected)
    made["a"][0] = np.nan
    made["factors"][:, 0] = 1
    assert np.isnan(run_low_rank(interpreter, made, "float32")).all()


def test_each_token_reads_its_own_experts_only(interpreter: Interpreter) -> None:
    """Within one step: token 0 does not read what token 1 has selected."""
    made = operands(2, 8, 32, 32, "float32")
    made["factors"][0, :4], made["factors"][1, :4] = 0, 1
    expected = run_low_rank(interpreter, made, "float32")
    made["a"][:4], made["b"][:4] = np.nan, np.nan
    got = run_low_rank(interpreter, made, "float32")
    assert np.array_equal(got[0], expected[0])
    assert np.isnan(got[1]).all()


def test_no_expert_gives_the_base_and_no_token_nothing(interpreter: Interpreter) -> None:
    for tokens in (1, 20):
        made = operands(tokens, 8, 32, 32, "float32")
        made["factors"][:] = 0
        assert np.array_equal(run_low_rank(interpreter, made, "float32"), made["base"])
    assert low_rank_launches((2, 0, 32), 8, 32, "float32") == ()
