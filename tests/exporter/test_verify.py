"""The measures themselves, what a report says at each level and dtype, and the check that rounding is only rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import exporter.build_bundle
import exporter.parts
from exporter.build_bundle import build
from exporter.errors import ExportError, VerifyError
from exporter.graphs import Exported
from exporter.parts import make_verification
from exporter.reference import ReferenceResult
from exporter.rounding import require_rounded, round_model
from exporter.spec import BuildSpec, DType
from exporter.store import TRANSPOSED
from exporter.verify import Measures, Scenario, compare, report_from_measures, require_passed
from exporter.verify_bundle import verify_bundle
from runtime.errors import MachineError, UserError
from runtime.manifest import Check, Mode, VerifyLevel, VerifyReport
from runtime.measures import Worst
from runtime.replay import Replay
from tests.exporter.checkpoint_makers import edit_tensors, write_lora
from tests.exporter.tiny_builds import Built, load, named_sources, quick, write_lively_base

VOCABULARY, PROMPT, NEW = 7, 4, 3
FED = PROMPT + NEW - 1


def compared(
    change: Callable[[np.ndarray], object] = lambda logits: None,
    gate_change: Callable[[np.ndarray], object] = lambda gate: None,
    tokens_change: Callable[[list[int]], object] = lambda tokens: None,
    scale: float = 3.0,
) -> dict[str, Check]:
    """The checks of one made-up prompt whose right answer is changed in one way."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(FED, VOCABULARY, generator=generator) * scale
    gate = torch.rand(FED, 2, 3, generator=generator)
    tokens = [0] * PROMPT + logits.argmax(-1)[PROMPT - 1 :].tolist()
    got, got_gate = logits.numpy().copy(), gate.numpy().copy()
    change(got)
    gate_change(got_gate)
    tokens_change(tokens)
    expected = ReferenceResult(logits, gate)
    base = ReferenceResult(logits + 1, None)
    scenario = Scenario("gate", None, True, False, lambda ids: expected, lambda ids: base)
    measures = Measures()
    compare(Replay(PROMPT, tuple(tokens), got, got_gate), scenario, measures)
    report = report_from_measures(measures, "dynamic", VerifyLevel.FULL, "A", "not needed (fp32)")
    assert report.adapters_matter == pytest.approx(1.0)
    assert (report.prefill_positions, report.decode_steps, report.prompts) == (PROMPT, NEW - 1, 1)
    return {check.name: check for check in report.checks}


def wrong(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


def test_equal_is_equal() -> None:
    checks = compared()
    assert wrong(checks) == set()
    assert checks["logits"].value == checks["gate"].value == 0.0
    assert abs(checks["kld_mean"].value) < 1e-15


def put(position: int, column: int, value: float) -> Callable[[np.ndarray], object]:
    def change(array: np.ndarray) -> None:
        array.reshape(FED, -1)[position, column] += value

    return change


def test_logits_are_relative_and_placed() -> None:
    checks = compared(put(PROMPT + 1, 2, 0.1))
    assert {"logits", "kld_mean"} <= wrong(checks)
    assert checks["logits"].where == "gate, prompt 0, decode step 1"
    assert compared(put(1, 2, 0.1))["logits"].where == "gate, prompt 0, prefill position 1"


def test_divergence_sees_what_logits_let_pass() -> None:
    def lift_the_best(logits: np.ndarray) -> None:
        logits[np.arange(FED), logits.argmax(-1)] += 1.3e-3

    assert wrong(compared(lift_the_best, scale=1.0)) == {"kld_mean"}


def test_a_shift_of_all_logits_is_seen_by_logits_alone() -> None:
    def shift(logits: np.ndarray) -> None:
        logits += 0.1

    assert wrong(compared(shift)) == {"logits"}


def test_gate_by_itself() -> None:
    checks = compared(gate_change=put(PROMPT, 4, 2e-5))
    assert wrong(checks) == {"gate"}
    assert checks["gate"].where == "gate, prompt 0, decode step 0"


def test_gate_above_one_is_relative() -> None:
    """Without a softmax scalings are logits of any size, and so is their noise."""

    def scale(gate: np.ndarray) -> None:
        gate *= 1 + 5e-6

    assert wrong(compared(gate_change=scale)) == set()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_fails_and_stays_json(value: float) -> None:
    checks = compared(put(3, 1, value))
    assert {"logits", "kld_mean"} <= wrong(checks)
    assert json.loads(json.dumps(checks["logits"].value, allow_nan=False)) > 1e300


def test_worst_keeps_the_largest_and_its_place() -> None:
    worst = Worst(10.0)
    for value, place in ((1.0, "a"), (3.0, "b"), (2.0, "c")):
        worst.see(value, place, 10.0)
    assert (worst.value, worst.where) == (3.0, "b")
    worst.see(5.0, "noisy", 20.0)
    assert (worst.where, worst.limit) == ("b", 10.0), "5 of 20 is better than 3 of 10"
    worst.see(7.0, "noisier", 20.0)
    assert (worst.value, worst.where, worst.limit) == (7.0, "noisier", 20.0)
    worst.see(float("nan"), "d", 10.0)
    assert (worst.value, worst.where) == (float("inf"), "d")


def exchange_top(logits: np.ndarray) -> None:
    order = np.argsort(logits[2])
    logits[2, order[-1]], logits[2, order[-2]] = logits[2, order[-2]], logits[2, order[-1]]


def test_flip_of_a_clear_argmax() -> None:
    assert {"argmax_flips", "logits"} <= wrong(compared(exchange_top))
    assert compared(exchange_top, scale=1e-4)["argmax_flips"].passed, "ties under the margin may flip"


def test_wrong_token() -> None:
    def other(tokens: list[int]) -> None:
        tokens[-1] = (tokens[-1] + 1) % VOCABULARY

    checks = compared(tokens_change=other)
    assert wrong(checks) == {"greedy_tokens"}
    assert checks["greedy_tokens"].where == "gate, prompt 0, new token 2"
    assert compared(tokens_change=other, scale=1e-6)["greedy_tokens"].passed, "ties may go either way"


def test_tokens_of_a_rule_that_is_not_causal_are_judged_when_they_were_chosen() -> None:
    """Flattened top-k softmax: a later token changes the logits of earlier positions."""

    def reference(ids: Any) -> ReferenceResult:
        logits = torch.zeros(len(ids), VOCABULARY)
        logits[:, len(ids)] = 5.0  # all positions agree, and all change with each token
        return ReferenceResult(logits, None)

    tokens = (0, 1, 2, 3)
    scenario = Scenario("gate", None, True, True, reference, reference)
    for made, passed in ((tokens, True), ((0, 1, 5, 3), False)):
        measures = Measures()
        compare(Replay(2, made, reference(made[:-1]).logits.numpy(), None), scenario, measures)
        assert (measures.tokens.value == 0) == passed


@pytest.mark.parametrize(
    ("tie", "wrong_from", "wrong_measures", "share"),
    [
        (4, 4, set(), 1 / 3),  # the last two of six positions come after it
        (1, 1, {"router_ties"}, 5 / 6),
        (4, 3, {"logits"}, 1 / 3),  # wrong before the tie
        (None, 4, {"logits"}, 0.0),
        (4, None, set(), 0.0),
    ],
)
def test_only_what_follows_a_tie_of_a_router_is_not_compared(
    tie: int | None, wrong_from: int | None, wrong_measures: set[str], share: float
) -> None:
    logits = torch.randn(FED, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    margin, got = torch.ones(FED), logits.clone()
    if tie is not None:
        margin[tie] = 1e-5
    if wrong_from is not None:
        got[wrong_from:] += 0.1  # all logits of a position, so that only they tell
    tokens = [0] * PROMPT + logits.argmax(-1)[PROMPT - 1 :].tolist()
    expected = ReferenceResult(logits, None, margin)
    scenario = Scenario("arrow", None, False, False, lambda ids: expected, lambda ids: expected, is_routed=True)
    measures = Measures()
    compare(Replay(PROMPT, tuple(tokens), got.numpy(), None), scenario, measures)
    checks = report_from_measures(measures, "dynamic", VerifyLevel.FULL, "A", "").checks
    found = {check.name: check for check in checks}
    assert (wrong(found), found["router_ties"].value) == (wrong_measures, pytest.approx(share))


def report(*checks: Check) -> VerifyReport:
    return report_from_measures(Measures(), "static", VerifyLevel.QUICK, "A", "").model_copy(update={"checks": checks})


def test_every_failed_measure_is_told_with_its_place() -> None:
    bad = [Check(name=n, value=0.5, limit=0.001, passed=False, where=f"place of {n}") for n in ("logits", "gate")]
    good = Check(name="kld_mean", value=0.0, limit=1e-7, passed=True)
    require_passed(report(good))
    with pytest.raises(
        VerifyError,
        match=r"graph static: the exported graph is not the model: logits 0\.5 > 0\.001 \(place of logits\); "
        r"gate 0\.5 > 0\.001 \(place of gate\)\. Fix: such a graph is never published",
    ) as error:
        require_passed(report(*bad, good))
    assert "kld_mean" not in str(error.value)
    assert error.value.code == "E_VERIFY"


def test_a_graph_without_gate_has_no_gate_check() -> None:
    checks = report_from_measures(Measures(), "static", VerifyLevel.QUICK, "A", "").checks
    assert [check.name for check in checks] == ["logits", "kld_mean", "argmax_flips", "greedy_tokens"]


def test_structure_is_never_called_verified(family_build: Callable[[str], Built]) -> None:
    built = family_build("llama")
    spec = BuildSpec(verify=VerifyLevel.STRUCTURE)
    verification = make_verification(built.checkpoint.parts(), spec, None)
    found, golden = verification.run(built.bundle.root, built.bundle.manifest.graphs[0])
    assert (found.level, found.stage, found.stage_b, found.checks) == (VerifyLevel.STRUCTURE, "none", "not run", ())
    assert found.prompts == found.decode_steps == 0
    assert golden == []


def test_level_is_full_for_small_models(family_build: Callable[[str], Built], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = family_build("llama").checkpoint.parts()
    assert make_verification(parts, BuildSpec(), None).level is VerifyLevel.FULL
    monkeypatch.setattr(exporter.parts, "FULL_UP_TO", 10)
    large = make_verification(parts, BuildSpec(), None)
    assert (large.level, large.is_large) == (VerifyLevel.QUICK, True)
    assert make_verification(parts, BuildSpec(verify=VerifyLevel.FULL), None).level is VerifyLevel.FULL


def test_none_of_the_users_prompts_is_left_out(family_build: Callable[[str], Built]) -> None:
    parts = family_build("llama").checkpoint.parts()
    texts = tuple(f"text {number}" for number in range(40))
    assert make_verification(parts, BuildSpec(prompts=texts), None)._extent().prompts == 40
    assert make_verification(parts, BuildSpec(prompts=texts[:2]), None)._extent().prompts == 32


def test_a_build_whose_graph_is_wrong_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    sources = named_sources({"one": write_lora(tmp_path / "one", base, ("q_proj", "v_proj"), 2)})
    right = exporter.parts.stack

    def half(*arguments: Any) -> Any:
        return tuple(replace(site, weights=site.weights / 2) for site in right(*arguments))

    monkeypatch.setattr(exporter.parts, "stack", half)
    with pytest.raises(VerifyError, match="the exported graph is not the model: logits"):
        build(replace(quick(sources, base), out=tmp_path / "out" / "bundle"))
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


def alter_first_byte(exported: Exported, name: str) -> Callable[[], None]:
    """Flip the lowest bit of a stored weight; returns what undoes it."""
    stored = exported.store.stored[f"{name}{TRANSPOSED}"]
    path = exported.store.root / stored.path
    before = path.read_bytes()
    flipped = bytearray(before)
    flipped[stored.offset] ^= 1

    def write(data: bytes) -> None:
        with path.open("r+b") as file:  # in place: the graph has the file mapped
            file.write(data)

    write(bytes(flipped))
    return lambda: write(before)


@pytest.mark.parametrize(
    ("dtype", "modes"),
    [
        (DType.FLOAT16, (Mode.DYNAMIC, Mode.STATIC)),
        pytest.param(DType.BFLOAT16, (Mode.DYNAMIC,), marks=pytest.mark.long),
    ],
    ids=["float16", "bfloat16"],
)
def test_rounded_build(dtype: DType, modes: tuple[Mode, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage A on the fp32 twin, every weight its twin's rounded once, and one altered bit is seen."""
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    experts = {
        name: write_lora(tmp_path / name, base, targets, 2, seed=seed)
        for seed, (name, targets) in enumerate({"a": ("q_proj", "embed_tokens"), "b": ("down_proj",)}.items())
    }
    seen: list[str] = []

    def check_and_break(proof: Exported, rounded: Exported) -> None:
        require_rounded(proof, rounded)
        own = "static/" if rounded.info.mode is Mode.STATIC else ""
        altered = "model.layers.0.mlp.down_proj.weight"
        undo = alter_first_byte(rounded, own + altered)
        with pytest.raises(
            VerifyError,
            match=rf"graph {rounded.info.name}, weight {altered}\.T: the rounded graph is not its verified fp32 twin; "
            r"got values that are not the fp32 weights rounded to nearest",
        ):
            require_rounded(proof, rounded)
        undo()
        require_rounded(proof, rounded)
        seen.append(rounded.info.name)

    monkeypatch.setattr(exporter.build_bundle, "require_rounded", check_and_break)
    mix = {"a": 0.6, "b": 0.7} if Mode.STATIC in modes else None
    spec = replace(quick(named_sources(experts), base), dtype=dtype, modes=modes, mix=mix, out=tmp_path / "bundle")
    bundle = build(spec)
    assert seen == [graph.name for graph in bundle.manifest.graphs] == [mode.value for mode in modes]
    for found in bundle.manifest.reports:
        assert (found.stage, found.stage_b) == ("A (fp32 twin)", "not run")
        assert all(check.passed for check in found.checks)
    assert bundle.manifest.base.dtype == dtype.value
    assert not (bundle.root / "twin").exists()
    stored = ir.load(bundle.root / "dynamic.onnx").graph.initializers["model.layers.0.mlp.down_proj.weight.T"]
    assert str(stored.dtype) == {"float16": "FLOAT16", "bfloat16": "BFLOAT16"}[dtype.value]
    with pytest.raises(MachineError, match=rf"the numbers of a {dtype} bundle cannot be checked on the CPU"):
        verify_bundle(bundle.root)
    monkeypatch.undo()
    results = verify_bundle(bundle.root, replace(spec, out=None), threads=1)
    assert [(found.graph, found.against) for found in results] == [(m.value, "reference forward") for m in modes]


def test_rounding_leaves_what_the_model_computes_for_itself(tmp_path: Path) -> None:
    """Rotary frequencies in bf16 would be off by a radian at position 1000."""
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    model = load(base, *named_sources({"a": write_lora(tmp_path / "a", base, ("q_proj",), 2)})).model
    before = model.model.rotary_emb.inv_freq.clone()
    round_model(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def exported(operators: list[str], **weights: np.ndarray) -> Exported:
    """A graph of these operators, with these weights in memory."""
    x = ir.Value(name="x")
    nodes = [ir.node(operator, [x]) for operator in operators]
    graph = ir.Graph([x], [], nodes=nodes, opset_imports={"": 18}, name="g")
    for name, array in weights.items():
        graph.register_initializer(ir.Value(name=name, const_value=External(array, name)))
    info: Any = SimpleNamespace(name="dynamic")
    store: Any = None
    return Exported(info, ir.Model(graph, ir_version=10), store)


class External(ir.ExternalTensor):
    """A stored tensor without a file."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        super().__init__(
            "f", 0, array.nbytes, ir.DataType.from_numpy(array.dtype), shape=ir.Shape(array.shape), name=name
        )
        self._values = array

    def numpy(self) -> np.ndarray:
        return self._values


W32 = np.array([1.0, 1 / 3, 65_504.0], np.float32)


def test_casts_and_rounding_are_all_that_may_differ() -> None:
    require_rounded(exported(["Add", "Mul"], w=W32), exported(["Cast", "Mul", "Add"], w=W32.astype(np.float16)))


def test_another_operator_is_refused() -> None:
    with pytest.raises(VerifyError, match=r"graph dynamic, operator 1: the rounded graph is not .*; got Sub"):
        require_rounded(exported(["Add", "Mul"]), exported(["Add", "Sub"]))
    with pytest.raises(VerifyError, match=r"operator 1: .*; got none"):
        require_rounded(exported(["Add", "Mul"]), exported(["Add"]))


def test_a_weight_without_twin_is_refused() -> None:
    with pytest.raises(VerifyError, match=r"weight w: .*; got no such weight in the fp32 twin"):
        require_rounded(exported(["Add"]), exported(["Add"], w=W32.astype(np.float16)))


def test_a_weight_beyond_the_dtype_is_refused_with_a_hint() -> None:
    large = W32 * 2
    with np.errstate(over="ignore"):
        rounded = exported(["Add"], w=large.astype(np.float16))
    with pytest.raises(ExportError, match=r"weight w leaves the range of float16\. Fix: build with --dtype bfloat16"):
        require_rounded(exported(["Add"], w=large), rounded)


def test_base_weights_beyond_float16_are_refused_before_tracing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, by name; bfloat16 takes them."""
    base = write_lively_base(tmp_path / "base")
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name][1, 2] = 65_536.0

    edit_tensors(base / "model.safetensors", enlarge)
    lora = write_lora(tmp_path / "lora", base, ("v_proj",), 2)
    monkeypatch.setattr(exporter.build_bundle, "export_graphs", lambda *_: pytest.fail("traced"))
    spec = replace(quick(named_sources({"one": lora}), base), out=tmp_path / "bundle", dtype=DType.FLOAT16)
    with pytest.raises(UserError) as caught:
        build(spec)
    for name in names:
        assert f"weight {name} leaves the range of float16; got values up to 6.55e+04" in str(caught.value)
    assert "Fix: build with --dtype bfloat16 or float32" in str(caught.value)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(pytest.fail.Exception, match="traced"):
        build(replace(spec, dtype=DType.BFLOAT16))


def test_constants_inside_the_graph_are_rounded_once_too() -> None:
    proof, right, wrong = exported(["Add"]), exported(["Add"]), exported(["Add"])
    frequencies = np.array([1.0, 0.1, 0.01], np.float32)
    twice = frequencies.astype(np.float16).astype(np.float32)
    for graph, values in ((proof, frequencies), (right, frequencies.astype(np.float16)), (wrong, twice)):
        graph.model.graph.register_initializer(ir.Value(name="f", const_value=ir.tensor(values, name="f")))
    require_rounded(proof, right)
    with pytest.raises(VerifyError, match=r"constant f: .*; got values that no constant of the fp32 twin rounds to"):
        require_rounded(proof, wrong)


def test_rounding_towards_zero_is_refused() -> None:
    down = np.nextafter(W32.astype(np.float16), np.float16(0))
    with pytest.raises(VerifyError, match=r"weight w: .*values that are not the fp32 weights rounded to nearest"):
        require_rounded(exported(["Add"], w=W32), exported(["Add"], w=down))
