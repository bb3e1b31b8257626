"""Bundles whose graphs hold the plugins' operators: the same model everywhere, and engines with and without plugins."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter import build
from exporter.cli import main
from exporter.engines import EngineSpec, build_engines, link
from exporter.engines.plan import parse
from exporter.engines.spec import plugins_of, profiles_of
from exporter.errors import ExportError
from exporter.gate import PluginGate
from exporter.op_lint import lint
from exporter.spec import AdapterSource, BuildSpec, DType, OpChoice
from plugins.operators import DOMAIN, GATE_SCALINGS, GATED_LOW_RANK, GateRules
from runtime import GenerateOptions, complete, load
from runtime.backends import open_session
from runtime.bundle import Bundle, open_bundle
from runtime.engines import PlanInfo, Target, engine_folders, open_engines
from runtime.errors import MachineError
from runtime.inspect import render
from runtime.manifest import Emit, Mode, TopkSoftmax
from runtime.replay import replay
from runtime.session import SessionSettings
from tests.exporter.test_gate import config
from tests.exporter.tiny_builds import count_sites, quick, write_gate, write_lively_base, write_three_experts

PLUGIN, OPS = OpChoice.PLUGIN, OpChoice.OPS
BOTH = (GATE_SCALINGS, GATED_LOW_RANK)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> BuildSpec:
    """A gate with top-k and top-k softmax over experts of three ranks, the embedding and the head among the sites."""
    root = tmp_path_factory.mktemp("plugins")
    base = write_lively_base(root / "base")
    experts = write_three_experts(root / "experts", base)
    rules = {"top_k_lora": 2, "enable_softmax_topk": True, "softmax_temperature": 0.8}
    gate = write_gate(root / "gate", base, experts, sites=count_sites(experts), **rules)
    return replace(quick((AdapterSource(gate),), base), out=root / "ops")


@pytest.fixture(scope="module")
def plain(spec: BuildSpec) -> Bundle:
    return build(spec)


@pytest.fixture(scope="module")
def fused(spec: BuildSpec) -> Bundle:
    assert spec.out is not None
    return build(replace(spec, gate_op=PLUGIN, site_op=PLUGIN, out=spec.out.parent / "plugin"))


def nodes_of(bundle: Bundle) -> list[str]:
    model = onnx.load(bundle.root / "dynamic.onnx", load_external_data=False)
    onnx.checker.check_model(str(bundle.root / "dynamic.onnx"))
    return [node.op_type for node in model.graph.node if node.domain == DOMAIN]


def test_graphs_hold_the_operators_that_were_asked_for(plain: Bundle, fused: Bundle) -> None:
    assert nodes_of(plain) == []
    assert plain.manifest.graphs[0].plugins == ()
    sites = fused.manifest.sites
    adapted = [site for site in sites if site.kind != "embedding"]
    assert len(adapted) == len(sites) - 1
    assert sorted(nodes_of(fused)) == sorted([GATE_SCALINGS] + [GATED_LOW_RANK] * len(adapted))
    assert fused.manifest.graphs[0].plugins == BOTH
    model = onnx.load(fused.root / "dynamic.onnx", load_external_data=False)
    assert sorted(function.name for function in model.functions) == sorted(BOTH), "every engine knows what they mean"
    gate = next(node for node in model.graph.node if node.op_type == GATE_SCALINGS)
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in gate.attribute}
    assert (attributes.pop("plugin_namespace"), attributes.pop("plugin_version")) == (b"xlora", b"1")
    assert GateRules.of(attributes) == GateRules(True, pytest.approx(0.8), 2, True)


def test_they_are_the_same_model(plain: Bundle, fused: Bundle) -> None:
    """Both were verified against the reference; here against each other, and against the base."""
    runs = []
    for bundle in (plain, fused):
        graph = bundle.manifest.graphs[0]
        session = open_session("ort", bundle.file(graph.path), graph.signature, SessionSettings(64, threads=1))
        sites, experts = (int(size) for size in graph.signature.input("scalings").shape[2:])  # type: ignore[union-attr]
        prompts = [[3, 1, 4, 1, 5], [9, 2]]
        row = np.zeros((sites, experts), np.float32)
        runs.append([replay(session, prompts, 6, row, is_gated=True), replay(session, prompts, 6, row, is_gated=False)])
        session.close()
    for ours, theirs, base in zip(runs[0][0], runs[1][0], runs[0][1], strict=True):
        assert ours.tokens == theirs.tokens
        assert np.abs(ours.logits - theirs.logits).max() <= 1e-4
        assert ours.gate is not None
        assert theirs.gate is not None
        assert np.abs(ours.gate - theirs.gate).max() <= 1e-5
        assert np.abs(ours.logits[: ours.prompt] - base.logits[: ours.prompt]).max() > 0.05, "the experts matter"


def test_weights_lie_as_the_kernels_read_them(fused: Bundle) -> None:
    """a [R, in] and b [R, out]: the rows of an expert that no token selected are not read."""
    model = onnx.load(fused.root / "dynamic.onnx", load_external_data=False)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == GATED_LOW_RANK)
    _, _, a, b, _ = node.input
    assert shapes[a][0] == shapes[b][0] <= 2 + 3 + 4
    assert a.endswith(".lora_a")
    assert b.endswith(".lora_b.T")


@pytest.mark.parametrize(
    "settings",
    [
        {"emit": Emit.MODERN},
        {"dtype": DType.FLOAT16},
        pytest.param({"dtype": DType.BFLOAT16}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_every_emit_and_dtype(spec: BuildSpec, tmp_path: Path, settings: dict[str, Any]) -> None:
    bundle = build(replace(spec, gate_op=PLUGIN, site_op=PLUGIN, out=tmp_path / "bundle", **settings))
    assert set(nodes_of(bundle)) == set(BOTH)
    if Emit.PORTABLE is bundle.manifest.graphs[0].emit:
        assert not lint(ir.load(bundle.root / "dynamic.onnx"))


def test_static_graphs_have_no_plugins(spec: BuildSpec, tmp_path: Path) -> None:
    modes = {"modes": (Mode.DYNAMIC, Mode.STATIC), "mix": {"math": 0.5, "code": 0.5}}
    bundle = build(replace(spec, gate_op=PLUGIN, site_op=PLUGIN, out=tmp_path / "bundle", **modes))
    assert {graph.name: graph.plugins for graph in bundle.manifest.graphs} == {"dynamic": BOTH, "static": ()}


def test_a_gate_that_is_no_matter_of_rows_is_refused() -> None:
    flattened = config(3, top_k=2, softmax_topk=True, topk_softmax=TopkSoftmax.FLATTENED)
    with pytest.raises(
        ExportError, match="got --topk-softmax flattened; need a softmax over the experts of each token"
    ):
        PluginGate(flattened, 3)
    with pytest.raises(ExportError, match=r"got 65 experts; need at most 64\. Fix: --gate-op ops"):
        PluginGate(config(65), 65)


# --- engines ---


def engine(bundle: Bundle, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exporter", "engine", str(bundle.root), "--target", "trt-rtx", *options]
    return subprocess.run(
        [*command, "--compute-capability", "8.6", "--max-batch", "2", "--max-tokens", "16"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def plan_log(folder: str) -> tuple[tuple[str, ...], str]:
    engines = open_engines(Path(folder))
    log = json.loads((engines.root / "build.json").read_text())["log"]["dynamic"]
    return engines.manifest.plans[0].plugins, "\n".join(log)


@pytest.mark.skipif(sys.platform != "linux", reason="the library's link is a matter of Linux")
def test_engines_with_and_without_plugins(fused: Bundle) -> None:
    """Really built, by the command alone: nothing has to be set for the library that plugins need."""
    folders = set()
    for options, plugins in (
        ((), BOTH),
        (("--site-op", "ops"), BOTH[:1]),
        (("--gate-op", "ops", "--site-op", "ops"), ()),
    ):
        run = engine(fused, *options, "-q")
        assert (run.returncode, run.stderr) == (0, "")
        folder = run.stdout.strip()
        folders.add(folder)
        named, log = plan_log(folder)
        assert named == plugins
        assert {name for name in BOTH if f"created plugin: {name}" in log} == set(plugins)
    assert len(folders) == 3, "each choice is an engine of its own"
    assert {str(path) for path in engine_folders(fused.root)} == folders
    shown = render(open_bundle(fused.root))
    form = ", also for ONNX Runtime as dynamic.ort.onnx"
    assert f"append, operators GateScalings and GatedLowRank{form}\n" in shown
    assert "dynamic (plugins GateScalings and GatedLowRank): TensorRT for RTX" in shown
    assert "dynamic (plugins GateScalings): TensorRT for RTX" in shown


def test_a_graph_of_plain_operators_has_no_plugins_to_choose(plain: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", str(plain.root), "--target", "trt-rtx", "--gate-op", "plugin"]) == 2
    assert "Fix: build the bundle with --gate-op plugin" in capsys.readouterr().err
    assert plugins_of(plain.manifest.graphs[0], EngineSpec(Target.TRT_RTX)) == ()


@pytest.mark.skipif(sys.platform != "linux", reason="the library's link is a matter of Linux")
def test_python_without_the_link_is_told_so(fused: Bundle, tmp_path: Path) -> None:
    """TensorRT for RTX would end the process."""
    with pytest.raises(MachineError, match=r"asks for libtensorrt_rtx\.so when it adds a plugin.*LD_LIBRARY_PATH=DIR"):
        build_engines(open_bundle(fused.root), EngineSpec(Target.TRT_RTX, max_batch=3))
    assert not link.is_linked(Target.TRT_RTX)
    assert link.is_linked(Target.TRT)


def test_a_link_that_is_of_no_use_ends_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere/{link.PREFIX}123")
    with pytest.raises(MachineError, match="when it adds a plugin"):
        link.run_linked(["engine", "x"])


@pytest.mark.skipif(sys.platform != "linux", reason="the library's link is a matter of Linux")
def test_the_demo_checkpoint_in_one_command(tmp_path: Path) -> None:
    """Bundle and engine with both plugins; the same answers as the model's."""
    examples = Path(__file__).resolve().parents[2] / "examples" / "four-tasks"
    command = [sys.executable, "-m", "exporter", "build", "--adapters", str(examples / "xlora"), "--verify", "quick"]
    plugins = ["--gate-op", "plugin", "--site-op", "plugin", "--target", "trt-rtx", "--compute-capability", "8.6"]
    run = subprocess.run(
        [*command, *plugins, "--out", "demo", "-q"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    bundle, engines = run.stdout.split()
    assert open_engines(tmp_path / engines).manifest.plans[0].plugins == BOTH
    with load(tmp_path / bundle) as model:
        [answer] = complete(model, ["add 25+14="], GenerateOptions(max_new_tokens=4))
    assert (answer.text or "").strip() == "39"


class KeepingParser:
    """Keeps what it is given to parse."""

    def __init__(self) -> None:
        self.file: str | None = None
        self.model: onnx.ModelProto | None = None

    def parse_from_file(self, path: str) -> bool:
        self.file = path
        return True

    def parse(self, model: bytes, path: str) -> bool:
        assert Path(path).is_file(), "weights lie beside it"
        self.model = onnx.load_from_string(model)
        return True


@pytest.mark.parametrize("plugins", [(), BOTH[:1], BOTH])
def test_old_tensorrt_is_given_bare_nodes_for_the_plugins(fused: Bundle, plugins: tuple[str, ...]) -> None:
    """Before 10.7 it prefers a function to a plugin of that name; TensorRT for RTX would not tell."""
    parser, file = KeepingParser(), fused.root / "dynamic.onnx"
    [graph] = fused.manifest.graphs
    profiles = profiles_of(graph, EngineSpec(Target.TRT), fused.manifest.base.max_positions)
    planned = PlanInfo(graph="dynamic", onnx_sha256="0" * 64, path="p.plan", profiles=profiles, plugins=plugins)
    assert parse(parser, file, planned)
    if not plugins:
        assert (parser.file, parser.model) == (str(file), None)
        return
    assert parser.model is not None
    assert {function.name for function in parser.model.functions} == set(BOTH) - set(plugins)
    assert [node.op_type for node in parser.model.graph.node if node.domain == DOMAIN] == nodes_of(fused)
