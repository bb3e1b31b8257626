"""Engines built for this machine's GPU against the recording of PyTorch: prefill and 64 decode steps of every build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter import build
from exporter.engines import EngineSpec, build_engines
from exporter.spec import CacheChoice, DType, OpChoice
from runtime.bundle import Bundle, open_bundle
from runtime.compare import Comparison, compare, render
from runtime.engines import EngineFolder, Target
from runtime.manifest import Emit, Mode
from runtime.model import load
from runtime.recording import Recording, require_same_model
from scripts.gpu_machine import capabilities, gpu
from tests.exporter.mutations import copy_of, edit_weight
from tests.exporter.reseal import reseal
from tests.exporter.test_compare import recorded
from tests.exporter.tiny_builds import Built
from tests.polygraphy_runs import agree, decode, ort_runner, prefill, trt_runner, why_no_trt_runner

pytestmark = pytest.mark.gpu

# What is built of the tiny checkpoint, by name; a new kind of build is one line.
BUILDS: dict[str, dict[str, Any]] = {
    "dynamic float32": {},
    "dynamic float16": {"dtype": DType.FLOAT16},
    "dynamic bfloat16": {"dtype": DType.BFLOAT16},
    "static float32": {"modes": (Mode.STATIC,), "mix": {"math": 0.7, "code": 0.2, "prose": 0.4}},
    "no cache float32": {"cache": CacheChoice.NONE},
    "modern float16": {"dtype": DType.FLOAT16, "emit": Emit.MODERN},
    "plugins float32": {"gate_op": OpChoice.PLUGIN, "site_op": OpChoice.PLUGIN},
    "plugins float16": {"gate_op": OpChoice.PLUGIN, "site_op": OpChoice.PLUGIN, "dtype": DType.FLOAT16},
    "plugins bfloat16": {"gate_op": OpChoice.PLUGIN, "site_op": OpChoice.PLUGIN, "dtype": DType.BFLOAT16},
}


@pytest.fixture(scope="module")
def built(target: Target, family_build: Callable[[str], Built]) -> Built:
    """Asks for the target first: without a GPU nothing is built in vain."""
    return family_build("llama")


@pytest.fixture(scope="module", params=BUILDS)
def bundle(request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A build of its own, since engines lie beside their bundle."""
    out = tmp_path_factory.mktemp("gpu") / "bundle"
    return build(built.checkpoint.spec(out=out, **BUILDS[request.param]))


@pytest.fixture(scope="module")
def recording(built: Built, bundle: Bundle) -> Recording:
    return recorded(built, DType(bundle.manifest.base.dtype), bundle.manifest.graphs[0], bundle)


def engines_for(bundle: Bundle, target: Target, **ops: Any) -> EngineFolder:
    """Engines for this GPU, large enough for the texts."""
    found = gpu()
    assert found is not None
    spec = EngineSpec(
        target, compute_capabilities=capabilities(target, found), max_batch=4, max_tokens=32, max_context=128, **ops
    )
    return build_engines(bundle, spec)


@pytest.fixture(scope="module")
def engines(bundle: Bundle, target: Target) -> EngineFolder:
    return engines_for(bundle, target)


@pytest.mark.parametrize("op", ["gate_op", "site_op"])
def test_a_plugin_bundle_built_as_functions_is_the_model(op: str, built: Built, target: Target, tmp_path: Path) -> None:
    """One of the two runs as its local function says."""
    plugins: dict[str, Any] = {"gate_op": OpChoice.PLUGIN, "site_op": OpChoice.PLUGIN}
    bundle = build(built.checkpoint.spec(out=tmp_path / "bundle", **plugins))
    engines_for(bundle, target, **{op: OpChoice.OPS})
    comparison = compared(bundle, recorded(built, DType.FLOAT32, bundle.manifest.graphs[0], bundle), target)
    assert comparison.passed, render(comparison)


def compared(bundle: Bundle, recording: Recording, target: Target) -> Comparison:
    with load(bundle.root, backend=target.value, graph=bundle.manifest.graphs[0].name) as model:
        require_same_model(recording, model.manifest, model.graph)
        return compare(model.session, recording, accept_noise=True)  # the tiny model's bf16 is as coarse as the limit


def test_an_engine_is_the_model(bundle: Bundle, engines: EngineFolder, recording: Recording, target: Target) -> None:
    comparison = compared(bundle, recording, target)
    assert comparison.passed, render(comparison)


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_polygraphy_finds_an_engine_equal_to_onnx_runtime(
    step: str, bundle: Bundle, engines: EngineFolder, target: Target
) -> None:
    dtype = bundle.manifest.base.dtype
    [graph] = bundle.manifest.graphs
    if dtype == "bfloat16" or graph.emit is Emit.MODERN:
        pytest.skip("neither numpy nor ONNX Runtime's CPU can compute this graph: the recording alone judges it")
    if reason := why_no_trt_runner():
        pytest.skip(reason)
    [plan] = engines.manifest.plans
    names = [profile.name for profile in plan.profiles]
    if step not in names:
        pytest.skip("a graph without caches has one profile for one row: the recording alone judges it")
    feeds = {"prefill": prefill, "decode": decode}[step](graph.signature)
    engine = trt_runner(engines.file(plan.path).read_bytes(), target, names.index(step), plan.plugins)
    assert agree([ort_runner(bundle.file(graph.path)), engine], feeds, dtype)


def test_an_engine_of_a_wrong_graph_goes_red(built: Built, target: Target, tmp_path: Path) -> None:
    mutant = copy_of(built.bundle.root, tmp_path)
    edit_weight(mutant, "model.layers.1.mlp.up_proj.lora_b", lambda b: b * 0)
    reseal(mutant)
    wrong = open_bundle(mutant)
    engines_for(wrong, target)
    comparison = compared(wrong, recorded(built, DType.FLOAT32), target)
    assert "kld_mean" in {check.name for check in comparison.checks if not check.passed}
