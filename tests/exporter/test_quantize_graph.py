"""Quantised weights in a graph: the rounding, the bytes, both rewrites, on graphs of one product."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from exporter.block_rounding import packed, round_blocks
from exporter.errors import ExportError
from exporter.external_data import check_external_data
from exporter.op_lint import lint
from exporter.passes.quantize_weights import QuantizeWeightsPass
from exporter.quantization import Quantizer, stored_parts
from exporter.quantized_reference import rounded_activations
from exporter.store import WeightStore, weight_from_tensor
from runtime.quantization import ActivationType, QuantizationInfo, WeightType, session_entries

IN, OUT, BLOCK, WORDS = 64, 24, 16, 40
KINDS = [(weights, symmetric) for weights in WeightType for symmetric in (True, False)]
HEAD = '<ir_version: 10, opset_import: ["": 21]>'
GRAPHS = {  # how a product may read its weight: as stored, through Gemm, upright through Gemm
    "MatMul": f"{HEAD} g (float[B,{IN}] x, float[{IN},{OUT}] w) => (float[B,{OUT}] y) {{ y = MatMul(x, w) }}",
    "Gemm": f"{HEAD} g (float[B,{IN}] x, float[{IN},{OUT}] w, float[{OUT}] b) => (float[B,{OUT}] y) "
    "{ y = Gemm(x, w, b) }",
    "upright": f"{HEAD} g (float[B,{IN}] x, float[{OUT},{IN}] w, float[{OUT}] b) => (float[B,{OUT}] y) "
    "{ y = Gemm <transB = 1> (x, w, b) }",
}


def info(weights: WeightType = WeightType.INT4, *, symmetric: bool = True) -> QuantizationInfo:
    return QuantizationInfo(weights=weights, block=BLOCK, symmetric=symmetric)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parsed(text: str) -> ir.Model:
    """A graph in ONNX's text form, with the inputs called w and b made weights."""
    model = ir.from_onnx_text(text)
    for value in [value for value in model.graph.inputs if value.name in ("w", "b")]:
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    return model


def dequantised(weight: torch.Tensor, how: QuantizationInfo) -> torch.Tensor:
    """[in, out] after rounding, written out entry by entry."""
    found = round_blocks(weight, how)
    result = torch.empty_like(weight)
    for i in range(weight.shape[0]):
        zero = 0 if found.zero is None else found.zero[i // how.block].float()
        result[i] = (found.q[i].float() - zero) * found.scale[i // how.block]
    return result


@pytest.mark.parametrize(("weights", "symmetric"), KINDS)
def test_rounding_goes_to_the_nearest_step(weights: WeightType, symmetric: bool) -> None:
    how, weight = info(weights, symmetric=symmetric), drawn(IN, OUT) * drawn(1, OUT, seed=1).exp()
    found = round_blocks(weight, how)
    assert found.scale.shape == (IN // BLOCK, OUT)
    assert found.q.dtype == (torch.int8 if symmetric else torch.uint8)
    assert (found.scale > 0).all()
    low, high = (-(1 << weights.bits - 1), (1 << weights.bits - 1) - 1) if symmetric else (0, (1 << weights.bits) - 1)
    assert (found.q.min(), found.q.max()) == (low, high)  # all the range that there is
    spread = weight.unflatten(0, (-1, BLOCK))
    spread = 2 * spread.abs().amax(1) if symmetric else spread.amax(1).clamp_min(0) - spread.amin(1).clamp_max(0)
    assert torch.allclose(found.scale * (high - low), spread)
    steps = (dequantised(weight, how) - weight).abs() / found.scale.repeat_interleave(BLOCK, 0)
    assert steps.max() <= (0.5001 if symmetric else 1.0001)
    assert steps.mean() < 0.27  # of nearest, 0.25


@pytest.mark.parametrize(("weights", "symmetric"), KINDS)
def test_zeros_stay_zeros(weights: WeightType, symmetric: bool) -> None:
    how = info(weights, symmetric=symmetric)
    weight = drawn(IN, OUT).abs() + 1
    weight[:BLOCK, 3] = 0
    weight[20, 5] = 0
    result = dequantised(weight, how)
    assert (result[:BLOCK, 3] == 0).all()
    assert result[20, 5] == 0
    assert torch.isfinite(result).all()


def test_4_bits_lie_as_onnx_packs_them() -> None:
    values = torch.arange(-8, 7, dtype=torch.int8)  # an odd number of them
    proto = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [15], values.tolist())
    raw = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(proto)).raw_data
    assert bytes(packed(values).numpy()) == raw
    assert packed(torch.tensor([1, 2], dtype=torch.uint8)).tolist() == [0x21]


@pytest.mark.parametrize(("weights", "symmetric"), KINDS)
@pytest.mark.parametrize("form", GRAPHS)
def test_a_product_reads_the_rounded_weight(form: str, weights: WeightType, symmetric: bool, tmp_path: Path) -> None:
    """In the standard operators, of which ONNX Runtime makes its MatMulNBits where that is faster."""
    how = info(weights, symmetric=symmetric)
    model, wanted, x = quantised(form, how, tmp_path)
    standard = run(model, tmp_path / "standard.onnx", session_entries(how), x)
    assert np.abs(standard - wanted).max() <= 1e-5 * np.abs(wanted).max()
    made = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node}
    assert ("MatMulNBits" in made) == (weights is WeightType.INT4)
    assert "DequantizeLinear" not in made, "once at load, not in every step"


@pytest.mark.parametrize("weights", WeightType)
def test_rounded_activations_are_what_the_kernel_rounds(weights: WeightType, tmp_path: Path) -> None:
    how = info(weights).model_copy(update={"activations": ActivationType.INT8})
    model, exact, x = quantised("MatMul", how, tmp_path)
    got = run(model, tmp_path / "standard.onnx", session_entries(how), x)
    rounded = rounded_activations(torch.from_numpy(x), BLOCK) @ dequantised(drawn(IN, OUT), how)
    assert np.abs(got - rounded.numpy()).max() <= 1e-5 * np.abs(exact).max()
    assert np.abs(got - exact).max() > 1e-3 * np.abs(exact).max()  # or there was nothing to see
    made = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node}
    assert made == {"MatMulNBits"}


def quantised(form: str, how: QuantizationInfo, root: Path) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """One of GRAPHS after the pass, its weights stored; what it is to give, and for which x [3, in]."""
    weight, bias, x = drawn(IN, OUT), drawn(OUT, seed=2), drawn(3, IN, seed=3)
    model = parsed(GRAPHS[form])
    wanted = x @ dequantised(weight, how)
    if "b" in model.graph.initializers:
        model.graph.initializers["b"].const_value = ir.tensor(bias.numpy(), name="b")
        wanted = wanted + bias
    step = QuantizeWeightsPass(["w"], [], how, ".T")
    step(model)
    [found] = step.found
    source = weight_from_tensor("w", weight.T if form == "upright" else weight)
    store(model, root, [(found, source)], how)
    return model, wanted.numpy(), x.numpy()


def store(model: ir.Model, root: Path, weights: list, how: QuantizationInfo) -> None:  # type: ignore[type-arg]
    """Write what the pass found, and point the graph to it."""
    kept = WeightStore(root)
    parts = [part for found, source in weights for part in stored_parts(found, source, torch.float32, Quantizer(how))]
    kept.write("base", [part.weight for part in parts])
    for part in parts:
        value = model.graph.initializers[part.initializer]
        value.const_value = kept.external(part.weight.name, part.packed)
        value.const_value.name = part.initializer


def run(model: ir.Model, path: Path, entries: dict[str, str], x: np.ndarray, name: str = "x") -> np.ndarray:  # type: ignore[type-arg]
    ir.save(model, path)
    onnx.checker.check_model(str(path))
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    result: np.ndarray = ort.InferenceSession(str(path), options).run(None, {name: x})[0]  # type: ignore[type-arg]
    return result


def test_a_tied_weight_is_looked_up_by_rows_and_multiplied_from_one_rounding(tmp_path: Path) -> None:
    """The table as int8 rows; the head from a second, turned copy; the float weight is gone."""
    how = info(WeightType.INT8)
    text = (
        f"{HEAD} g (int64[B,S] ids, float[{WORDS},{IN}] w) => (float[B,S,{WORDS}] y) "
        "{ e = Gather(w, ids) t = Transpose <perm = [1, 0]> (w) y = MatMul(e, t) }"
    )
    model, table = parsed(text), drawn(WORDS, IN)
    step = QuantizeWeightsPass(["w"], ["w"], how, ".T")
    step(model)
    assert "w" not in model.graph.initializers
    store(model, tmp_path, [(found, weight_from_tensor("w", table)) for found in step.found], how)
    ids = np.array([[1, 39], [7, 7]])
    rounded = dequantised(table.T.contiguous(), how).T
    got = run(model, tmp_path / "g.onnx", session_entries(how), ids, "ids")
    wanted = (rounded[ids] @ rounded.T).numpy()
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(wanted - (table[ids] @ table.T).numpy()).max() > 1e-3


def test_a_weight_that_nothing_multiplies_is_an_error() -> None:
    model = parsed(f"{HEAD} g (float[B,{IN}] x, float[{IN}] w) => (float[B,{IN}] y) {{ y = Add(x, w) }}")
    with pytest.raises(ir.passes.PassError, match="no product reads the weight w"):
        QuantizeWeightsPass(["w"], [], info(), ".T")(model)
    old = parsed(GRAPHS["MatMul"].replace('"": 21', '"": 18'))
    with pytest.raises(ir.passes.PreconditionError, match="opset 21"):
        QuantizeWeightsPass(["w"], [], info(), ".T")(old)


def test_a_weight_that_is_also_read_as_floats_is_an_error() -> None:
    text = GRAPHS["MatMul"].replace("y = MatMul(x, w)", "m = MatMul(x, w) r = ReduceSum(w) y = Add(m, r)")
    with pytest.raises(ir.passes.PostconditionError, match="still read as floats: w by ReduceSum"):
        QuantizeWeightsPass(["w"], [], info(), ".T")(parsed(text))


def test_the_lint_takes_opset_21_for_blocks_alone(tmp_path: Path) -> None:
    model, _, _ = quantised("MatMul", info(), tmp_path)
    assert lint(model) == ()
    plain = parsed(GRAPHS["MatMul"])
    assert [finding.operator for finding in lint(plain)] == ["opset"]
    (tmp_path / "more").mkdir()
    asymmetric, _, _ = quantised("MatMul", info(symmetric=False), tmp_path / "more")
    reasons = [finding.reason for finding in lint(asymmetric)]
    assert any("UINT4" in reason for reason in reasons)
    assert any("zero_point must be zero" in reason for reason in reasons)


def test_4_bits_take_half_the_bytes_of_a_bundle(tmp_path: Path) -> None:
    """External data of 4 bits is held to its own length."""
    model, _, _ = quantised("MatMul", info(), tmp_path)
    ir.save(model, tmp_path / "dynamic.onnx")
    check_external_data(tmp_path)
    proto = onnx.load(tmp_path / "dynamic.onnx", load_external_data=False)
    [q] = [each for each in proto.graph.initializer if each.data_type == onnx.TensorProto.INT4]
    entries = {entry.key: entry for entry in q.external_data}
    assert int(entries["length"].value) == IN * OUT // 2
    entries["length"].value = str(IN * OUT)
    onnx.save(proto, tmp_path / "dynamic.onnx")
    with pytest.raises(ExportError, match=rf"its shape needs {IN * OUT // 2} bytes, not {IN * OUT}|lie beyond"):
        check_external_data(tmp_path)


def test_stored_integers_are_read_back_as_int4(tmp_path: Path) -> None:
    model, _, _ = quantised("MatMul", info(), tmp_path)
    value = model.graph.initializers["w.int4"].const_value
    assert value is not None
    assert value.numpy().dtype == ml_dtypes.int4
    assert np.array_equal(value.numpy().astype(np.int8), round_blocks(drawn(IN, OUT), info()).q.numpy())
