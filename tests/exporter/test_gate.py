"""The gate by itself (fault R31): finite and normalised for any logits, and the same in torch, ONNX and the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exporter.adapters import GateConfig
from exporter.gate import Gate, apply_topk_rules, gate_info, scaling_pass_row
from exporter.passes.pipeline import clean_trace, write_form
from exporter.reference import _layer_rules
from runtime.manifest import Emit, TopkSoftmax
from runtime.signature import Signature
from tests.gate_rows import HUGE, ROWS, Rows, logits


def config(experts: int, sites: int = 1, **rules: Any) -> GateConfig:
    """A gate whose one layer passes its input through as logits."""
    plain = GateConfig(
        weights=(torch.eye(experts * sites),), biases=(None,), relu=True, layerwise=sites > 1, softmax=True,
        temperature=1.0, top_k=None, softmax_topk=False, topk_softmax=TopkSoftmax.TOKEN, scaling_pass_value=0.0,
        global_scaling_weight=1.0,
    )  # fmt: skip
    return replace(plain, **rules)


def run(rows: Rows, rules: GateConfig) -> torch.Tensor:
    """[rows, K] through the gate as one sequence."""
    with torch.no_grad():
        result: torch.Tensor = Gate(rules, rows.shape[1])(torch.from_numpy(rows)[None])[0, :, 0]
    return result


def rules_of(experts: int, top_k: int, temperature: float) -> list[tuple[str, GateConfig]]:
    dense = config(experts, temperature=temperature)
    top = replace(dense, top_k=min(top_k, experts))
    return [
        ("dense", dense),
        ("top-k", top),
        ("top-k softmax", replace(top, softmax=False, softmax_topk=True)),
        ("both", replace(top, softmax_topk=True)),
        ("flattened", replace(top, softmax=False, softmax_topk=True, topk_softmax=TopkSoftmax.FLATTENED)),
    ]


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(logits(), st.integers(1, 64), st.sampled_from([1e-3, 0.5, 1.0, 1e6]))
@example(np.full((ROWS, 64), HUGE, np.float32), 64, 1e-3)
def test_gate_is_finite_and_normalised(rows: Rows, top_k: int, temperature: float) -> None:
    for name, rules in rules_of(rows.shape[1], top_k, temperature):
        gate = run(rows, rules)
        assert torch.isfinite(gate).all(), name
        assert (gate >= 0).all(), name
        total = gate.sum(-1)
        if name == "dense":
            assert (total - 1).abs().max() <= 1e-3
        elif name in ("top-k softmax", "both"):
            assert ((total - 1).abs().minimum(total.abs()) <= 1e-3).all(), name  # 0 where nothing was left
        elif name == "flattened":
            assert min(abs(float(total.sum()) - 1), float(total.sum())) <= 1e-3
        assert ((gate > 0).sum(-1) <= (rules.top_k or 64)).all()


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(logits(), st.integers(1, 64))
def test_rules_are_the_oracles(rows: Rows, top_k: int) -> None:
    """Two writings of the same rules, finite masks here and PEFT's -inf there."""
    for name, rules in rules_of(rows.shape[1], top_k, 1.0)[1:]:
        scalings = torch.from_numpy(rows)[None, :, None]
        difference = (apply_topk_rules(scalings, rules) - _layer_rules(scalings, rules)).abs().max()
        assert float(difference) <= 1e-6 * max(1.0, HUGE if name == "top-k" else 1.0), name


@pytest.mark.parametrize("rule", [TopkSoftmax.TOKEN, TopkSoftmax.FLATTENED])
def test_a_selected_zero_is_dropped(rule: TopkSoftmax) -> None:
    """PEFT takes a scaling of exactly 0 for one that was not selected."""
    rules = config(2, softmax=False, top_k=2, softmax_topk=True, topk_softmax=rule)
    assert run(np.array([[-1.0, 0.0]], np.float32), rules).tolist() == [[1.0, 0.0]]


def test_nothing_selected_stays_zero() -> None:
    rules = config(3, softmax=False, top_k=2, softmax_topk=True)
    assert run(np.zeros((4, 3), np.float32), rules).tolist() == [[0.0] * 3] * 4


def test_scaling_pass_row() -> None:
    assert scaling_pass_row(config(3, scaling_pass_value=0.3), 3).tolist() == pytest.approx([0.3] * 3)
    top = config(3, scaling_pass_value=0.3, top_k=2)
    assert scaling_pass_row(top, 3).tolist() == pytest.approx([0.3, 0.3, 0.0])
    assert scaling_pass_row(replace(top, softmax_topk=True), 3).tolist() == pytest.approx([0.5, 0.5, 0.0])
    flattened = replace(top, softmax_topk=True, topk_softmax=TopkSoftmax.FLATTENED)
    assert gate_info(flattened, 3).scaling_pass_row_per_length
    assert not gate_info(replace(flattened, softmax_topk=False), 3).scaling_pass_row_per_length
    assert scaling_pass_row(config(3), 3).tolist() == [0.0] * 3


def deep() -> GateConfig:
    """Two layers with ReLU, two sites of four experts, one layer without bias."""
    generator = torch.Generator().manual_seed(3)
    weights = (torch.randn(6, 8, generator=generator), torch.randn(8, 6, generator=generator))
    return replace(config(8), weights=weights, biases=(torch.randn(6, generator=generator), None), temperature=0.7)


ONNX_GATES: dict[str, tuple[GateConfig, int]] = {
    "deep softmax": (replace(deep(), layerwise=True), 4),
    "top-k softmax": (config(8, softmax=False, top_k=3, softmax_topk=True), 8),
    "flattened": (
        config(4, 2, softmax=False, top_k=3, softmax_topk=True, topk_softmax=TopkSoftmax.FLATTENED), 4
    ),
}  # fmt: skip


def many_rows(width: int, count: int) -> Rows:
    """Seeded: ordinary, huge, equal and zero rows in turn; the first of each kind exactly so."""
    generator = np.random.default_rng(1)
    rows = generator.normal(0, 3, (count, width)).astype(np.float32)
    rows[1::4] *= HUGE / 20
    rows[2::4] = rows[2::4, :1]
    rows[3], rows[7], rows[11] = 0.0, HUGE, -HUGE
    return np.clip(rows, -HUGE, HUGE)


@pytest.mark.parametrize("name", ONNX_GATES)
def test_exported_gate_is_torch(name: str, tmp_path: Path) -> None:
    rules, experts = ONNX_GATES[name]
    gate = Gate(rules, experts).eval()
    hidden = torch.from_numpy(many_rows(8, 10_000)).reshape(2, 5_000, 8)
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("S")}
    program = torch.onnx.export(
        gate, (hidden[:, :5],), dynamo=True, opset_version=18, optimize=False, input_names=["hidden"],
        output_names=["gate"], dynamic_shapes=(dims,), verbose=False,
    )  # fmt: skip
    assert program is not None
    write_form(clean_trace(program.model, {}, {}), Emit.PORTABLE, 18, Signature((), (), ()))
    operators = {node.op_type for node in program.model.graph}
    assert not operators & {"ScatterElements", "NonZero", "ScatterND"}, "TensorRT for RTX refuses these"
    constants = [value.const_value for value in program.model.graph.initializers.values()]
    assert all(np.isfinite(tensor.numpy()).all() for tensor in constants if tensor is not None), "masks are finite"
    ir.save(program.model, tmp_path / "gate.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "gate.onnx"), providers=["CPUExecutionProvider"])
    [got] = session.run(None, {"hidden": hidden.numpy()})
    with torch.no_grad():
        expected = gate(hidden).numpy()
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    if rules.top_k is not None:  # of equal logits torch and ONNX may pick others, but as many
        tied = (np.diff(np.sort(hidden.numpy().reshape(got.shape))) == 0).any(-1)
        assert 0.1 < tied.mean() < 0.5
        got[tied], expected[tied] = np.sort(got[tied]), np.sort(expected[tied])
    assert np.abs(got - expected).max() <= 1e-5
    assert np.abs(got - got.mean(axis=(0, 1))).max() > 1e-4, "the gate must differ between rows"
