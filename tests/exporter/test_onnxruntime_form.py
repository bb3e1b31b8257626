"""Each graph's form for ONNX Runtime's CPU provider: equal numbers, caches in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.build_bundle import build
from exporter.errors import VerifyError
from exporter.parts import make_verification
from exporter.spec import BuildSpec
from exporter.verify_bundle import replay_graph
from runtime import GenerateOptions, complete, load
from runtime.backends import open_session
from runtime.bundle import open_bundle
from runtime.golden import GOLDEN_PATH, read_golden
from runtime.manifest import GraphInfo, OnnxRuntimeForm, VerifyLevel
from runtime.model import form_for
from runtime.rows import Rows
from runtime.session import Session, SessionSettings
from runtime.signature import CacheStyle
from tests.exporter.mutations import copy_of
from tests.exporter.reseal import reseal
from tests.exporter.tiny_builds import Built, prompt, shown

pytestmark = pytest.mark.usefixtures("without_twin")

Builds = Callable[[str], Built]
# A window, a softcap and one of each of the other attentions: norms of queries, learned positions, partial rotary.
FAMILIES = ("llama", "mistral", "gemma2", "qwen3", "gpt2", "gpt_neox")


def opened(bundle: Path, form: GraphInfo | OnnxRuntimeForm) -> Session:
    return open_session("ort", bundle / form.path, form.signature, SessionSettings(64, threads=1))


def steps(session: Session, weights: float, seed: int = 0) -> list[np.ndarray]:
    """Logits and gate of ragged steps in three slots, beyond a window of 8; `weights` of the second and third row."""
    session.allocate(3)
    scalings = session.signature.input("scalings")
    generator, seen = np.random.default_rng(seed), []
    for width, counts in ((9, (9, 4, 7)), (1, (1, 1, 1)), (5, (2, 5, 0)), (1, (1, 0, 1)), (3, (3, 3, 3))):
        tokens = generator.integers(0, 64, (3, width))
        mix = generator.random((3, width, *scalings.shape[2:]), np.float32) if scalings else None
        if mix is not None:
            mix *= np.array([0, weights, weights], np.float32)[:, None, None, None]
        taken = np.array(counts)
        result = session.step(Rows(tokens, taken, slice(0, 3), mix, np.maximum(taken - 1, 0)[:, None]))
        seen.append(result.logits[taken > 0])
        if result.gate is not None:
            seen += [result.gate[row, :count] for row, count in enumerate(counts) if count]
    session.close()
    return seen


def worst(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_form_has_the_graphs_numbers(family: str, family_build: Builds) -> None:
    bundle = family_build(family).bundle
    [graph] = bundle.manifest.graphs
    assert graph.onnxruntime is not None
    expected = steps(opened(bundle.root, graph), 1.0)
    assert worst(expected, steps(opened(bundle.root, graph.onnxruntime), 1.0)) < 1e-5
    base = steps(opened(bundle.root, graph), 0.0)
    assert worst(expected, base) > 1e-2, "the experts matter"
    assert worst(base, steps(opened(bundle.root, graph.onnxruntime), 0.0)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_form_writes_into_its_caches_and_leaves_no_attention_in_plain_operators(
    family: str,
    family_build: Builds,
) -> None:
    bundle = family_build(family).bundle
    [graph] = bundle.manifest.graphs
    assert graph.onnxruntime is not None
    blocks = bundle.manifest.base.blocks
    nodes = list(ir.load(bundle.file(graph.onnxruntime.path)).graph.all_nodes())
    counts = {name: sum(node.op_type == name for node in nodes) for name in ("TensorScatter", "Attention", "Softmax")}
    assert graph.onnxruntime.signature.cache_style is CacheStyle.ALIAS
    assert counts == {"TensorScatter": 2 * blocks, "Attention": blocks, "Softmax": counts["Softmax"]}
    assert counts["Softmax"] <= 1, "the gate's"
    assert len(nodes) < len(list(ir.load(bundle.file(graph.path)).graph.all_nodes()))


def test_verification_measures_the_form_too(family_build: Builds, tmp_path: Path) -> None:
    built = family_build("llama")
    [graph] = built.bundle.manifest.graphs
    assert graph.onnxruntime is not None
    folder = copy_of(built.bundle.root, tmp_path)
    break_norm(folder / graph.onnxruntime.path)
    spec = BuildSpec(verify=VerifyLevel.QUICK, threads=1)
    with pytest.raises(VerifyError, match=r"logits .*, in ONNX Runtime's form\)"):
        make_verification(built.checkpoint.parts(), spec, None).run(folder, graph)


def test_the_worse_of_both_is_reported(family_build: Builds) -> None:
    """A report that has a place in the form shows that it was measured; counts are the graph's own."""
    [report] = family_build("llama").bundle.manifest.reports
    assert report.prompts == 3 * 4, shown(report.checks)


def test_the_cpu_runs_the_form_and_nobody_else(family_build: Builds) -> None:
    bundle = family_build("llama").bundle
    [graph] = bundle.manifest.graphs
    assert form_for(graph, "ort", "cpu") is graph.onnxruntime
    for backend, provider in (("ort", "cuda"), ("ort", "tensorrt"), ("null", "cpu")):
        assert form_for(graph, backend, provider) is graph
    with load(bundle.root, threads=1) as model:
        assert model.session.signature.cache_style is CacheStyle.ALIAS
        found = complete(model, [prompt(5), prompt(9, 1)], GenerateOptions(max_new_tokens=12))
    with load(bundle.root, threads=1, portable=True) as model:
        assert model.session.signature.cache_style is CacheStyle.APPEND
        expected = complete(model, [prompt(5), prompt(9, 1)], GenerateOptions(max_new_tokens=12))
    assert [done.token_ids for done in found] == [done.token_ids for done in expected]


def test_the_golden_set_is_replayed_in_the_form_too(family_build: Builds, tmp_path: Path) -> None:
    built = family_build("llama")
    [graph] = built.bundle.manifest.graphs
    assert graph.onnxruntime is not None
    golden = read_golden(built.bundle.read(GOLDEN_PATH), "")
    assert all(check.passed for check in replay_graph(built.bundle, graph, golden.cases, 1))
    folder = copy_of(built.bundle.root, tmp_path)
    break_norm(folder / graph.onnxruntime.path)
    reseal(folder)
    broken = open_bundle(folder)
    worst_ones = {check.name: check for check in replay_graph(broken, graph, golden.cases, 1)}
    assert not worst_ones["golden_tokens"].passed or not worst_ones["golden_logits"].passed
    assert "in dynamic.ort.onnx" in worst_ones["golden_logits"].where + worst_ones["golden_tokens"].where


def break_norm(path: Path) -> None:
    """The first norm with an epsilon far off."""
    model = ir.load(path)
    norm = next(node for node in model.graph if node.op_type == "SkipSimplifiedLayerNormalization")
    norm.attributes.add(ir.AttrFloat32("epsilon", 0.1))
    ir.save(model, path)


def test_a_build_may_leave_it_out(family_build: Builds, tmp_path: Path) -> None:
    spec = family_build("llama").checkpoint.spec(
        out=tmp_path / "plain", onnxruntime=False, verify=VerifyLevel.STRUCTURE
    )
    bundle = build(spec)
    assert [graph.onnxruntime for graph in bundle.manifest.graphs] == [None]
    assert [artifact.path for artifact in bundle.artifacts("graph")] == ["dynamic.onnx"]
