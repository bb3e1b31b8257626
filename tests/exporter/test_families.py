"""Every family, exported with experts on all kinds of sites and checked against the reference; one bug each is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from exporter.build_bundle import build
from exporter.errors import ExportError
from exporter.spec import CacheChoice
from exporter.store import TRANSPOSED
from runtime.manifest import Emit, Mode, SiteInfo, TopkSoftmax
from runtime.signature import SCALINGS, CacheStyle
from tests.exporter.checkpoint_makers import write_lora
from tests.exporter.mutations import (
    add,
    bypass,
    constant,
    consumer,
    copy_of,
    edit_graph,
    edit_weight,
    nodes,
    replace_input,
    weight_names,
)
from tests.exporter.tiny_builds import (
    FAMILIES,
    Built,
    assert_lints,
    assert_wide_margin,
    build_family,
    failed,
    load,
    measured,
    named_sources,
    quick,
    shown,
    write_checkpoint,
    write_gate,
    write_lively_base,
    write_three_experts,
)

MIX = {"math": 0.7, "code": 0.3, "prose": -0.4}
Build = Callable[[str], Built]


@pytest.mark.parametrize("family", FAMILIES)
def test_portable_graph_is_the_reference(family: str, family_build: Build) -> None:
    manifest = family_build(family).bundle.manifest
    assert manifest.base.model_type == family
    assert {site.kind for site in manifest.sites} == {"linear", "embedding", "lm_head"}
    [graph] = manifest.graphs
    assert (graph.opset, graph.signature.cache_style) == (18, CacheStyle.APPEND)
    [report] = manifest.reports
    assert (report.stage, report.stage_b) == ("A", "not needed (fp32)")
    assert_wide_margin(report.checks)
    assert {"logits", "gate", "kld_mean", "argmax_flips", "greedy_tokens"} == {check.name for check in report.checks}
    assert report.adapters_matter > 0.5
    assert report.prefill_positions / report.prompts > 8, "prompts must be longer than the sliding windows"
    assert report.decode_steps >= report.prompts * 15


@pytest.mark.parametrize("family", FAMILIES)
def test_portable_graphs_pass(family: str, family_build: Build) -> None:
    """TensorRT's operators, as far as they can be known without it."""
    assert_lints(ir.load(family_build(family).bundle.root / "dynamic.onnx"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_lies_in_the_store_under_its_checkpoint_name(family: str, family_build: Build) -> None:
    built = family_build(family)
    stored: dict[str, np.ndarray] = {}
    for path in sorted((built.bundle.root / "weights").glob("*.safetensors")):
        stored |= {
            name.removesuffix(TRANSPOSED): value.T if name.endswith(TRANSPOSED) else value
            for name, value in load_file(path).items()
        }
    base = load_file(built.checkpoint.base / "model.safetensors")
    tied = {"lm_head.weight"} - base.keys()
    assert base.keys() - tied <= stored.keys()
    assert all((stored[name] == base[name]).all() for name in base)
    graph = ir.load(built.bundle.root / "dynamic.onnx").graph
    for value in graph.initializers.values():
        readers = {use.node.op_type for use in value.uses()}
        assert readers != {"Transpose"}, "an engine would copy this when it loads"
    inside = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    floats = [t for t in inside if t.dtype.is_floating_point() and not isinstance(t, ir.ExternalTensor)]
    assert max(tensor.size for tensor in floats) <= 4, "a copy of a weight"


def swap_q_and_k_sites(folder: Path, sites: tuple[SiteInfo, ...]) -> None:
    order = np.arange(len(sites))
    q, k = ([site.path for site in sites].index(f"model.layers.0.self_attn.{name}_proj") for name in "qk")
    order[[q, k]] = order[[k, q]]

    def edit(graph: ir.Graph) -> None:
        replace_input(graph, SCALINGS, lambda s: add(graph, "Gather", s, constant(graph, order), axis=2))

    edit_graph(folder, edit)


def window_off_by_one(folder: Path, sites: tuple[SiteInfo, ...]) -> None:
    def edit(graph: ir.Graph) -> None:
        windows = [node for node in nodes(graph, "Sub") if is_constant(node.inputs[1], 8)]
        assert windows
        for node in windows:
            node.replace_input_with(1, constant(graph, 9))

    edit_graph(folder, edit)


def is_constant(value: ir.Value | None, wanted: int) -> bool:
    known = None if value is None else value.const_value
    return known is not None and known.size == 1 and known.dtype is ir.DataType.INT64 and known.numpy().item() == wanted


def query_bias_dropped(folder: Path, sites: tuple[SiteInfo, ...]) -> None:
    edit_weight(folder, "model.layers.0.self_attn.q_proj.bias", lambda bias: bias * 0)


def query_norm_dropped(folder: Path, sites: tuple[SiteInfo, ...]) -> None:
    def edit(graph: ir.Graph) -> None:
        weighted = consumer(graph, "model.layers.1.self_attn.q_norm.weight", "Mul")
        normed = weighted.inputs[1]
        assert normed is not None
        divided = normed.producer()
        assert divided is not None
        assert divided.inputs[0] is not None
        bypass(weighted, divided.inputs[0])

    edit_graph(folder, edit)


def softcap_dropped(folder: Path, sites: tuple[SiteInfo, ...]) -> None:
    def edit(graph: ir.Graph) -> None:
        tanh = next(node for node in nodes(graph, "Tanh") if reads(node, "Div"))
        assert tanh.inputs[0] is not None
        bypass(tanh, tanh.inputs[0])

    edit_graph(folder, edit)


def reads(node: ir.Node, op: str) -> bool:
    source = node.inputs[0]
    producer = None if source is None else source.producer()
    return producer is not None and producer.op_type == op


def gate_and_up_exchanged(folder: Path, sites: tuple[SiteInfo, ...]) -> None:
    def exchange(weight: np.ndarray) -> np.ndarray:
        return np.concatenate(np.split(weight, 2)[::-1])

    edit_weight(folder, "model.layers.0.mlp.gate_up_proj.weight", exchange)


FAMILY_MUTANTS = {
    "llama": swap_q_and_k_sites,
    "mistral": window_off_by_one,
    "qwen2": query_bias_dropped,
    "qwen3": query_norm_dropped,
    "gemma2": softcap_dropped,
    "phi3": gate_and_up_exchanged,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_mutant_is_caught(family: str, family_build: Build, tmp_path: Path) -> None:
    built = family_build(family)
    manifest = built.bundle.manifest
    folder = copy_of(built.bundle.root, tmp_path)
    parts = built.checkpoint.parts()
    assert_wide_margin(measured(parts, manifest.graphs[0], folder).checks)
    FAMILY_MUTANTS[family](folder, manifest.sites)
    caught = failed(measured(parts, manifest.graphs[0], folder))
    assert {"logits", "kld_mean"} <= caught.keys()
    assert all(caught[name].value > 10 * caught[name].limit for name in ("logits", "kld_mean")), shown(
        [*caught.values()]
    )


def test_modern_graph_is_the_reference(tmp_path: Path) -> None:
    """Mistral: the sliding window is the hard case of the cache that the graph itself writes."""
    modern_is_the_reference("mistral", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_other_modern_graphs_are_the_reference(family: str, tmp_path: Path) -> None:
    modern_is_the_reference(family, tmp_path)


def modern_is_the_reference(family: str, folder: Path) -> None:
    built = build_family(folder, family, emit=Emit.MODERN)
    [graph], [report] = built.bundle.manifest.graphs, built.bundle.manifest.reports
    assert (graph.opset, graph.signature.cache_style) == (24, CacheStyle.ALIAS)
    assert_wide_margin(report.checks)
    operators = {node.op_type for node in ir.load(built.bundle.root / "dynamic.onnx").graph}
    assert {"Attention", "TensorScatter", "RMSNormalization", "RotaryEmbedding"} <= operators
    mutant = copy_of(built.bundle.root, folder)

    def write_one_too_far(graph: ir.Graph) -> None:
        for node in nodes(graph, "TensorScatter"):
            assert node.inputs[2] is not None
            start = add(graph, "Max", add(graph, "Sub", node.inputs[2], constant(graph, [1])), constant(graph, [0]))
            node.replace_input_with(2, start)

    edit_graph(mutant, write_one_too_far)
    parts = built.checkpoint.parts()
    assert not failed(measured(parts, graph, mutant, new_tokens=1))
    caught = failed(measured(parts, graph, mutant))
    assert "decode step" in caught["kld_mean"].where


def test_modern_gemma2_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "gemma2")
    with pytest.raises(ExportError, match=r"--emit modern: gemma2 caps its attention logits .* Fix: --emit portable"):
        build(checkpoint.spec(out=tmp_path / "bundle", emit=Emit.MODERN))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_and_static_in_one_build(family: str, tmp_path: Path) -> None:
    built = build_family(tmp_path, family, modes=(Mode.STATIC, Mode.DYNAMIC), mix=MIX)
    manifest = built.bundle.manifest
    assert [graph.mode for graph in manifest.graphs] == [Mode.DYNAMIC, Mode.STATIC]
    for report in manifest.reports:
        assert_wide_margin(report.checks)
        assert report.adapters_matter > 0.5
    static = weight_names(built.bundle.root)
    assert {name for name in static if name.startswith("static/")} == {
        f"static/{site.path}.weight" for site in manifest.sites
    }


def test_flattened_rule_in_a_graph_without_cache(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base")
    experts = write_three_experts(tmp_path / "experts", base, ends=False)
    gate = write_gate(
        tmp_path / "xlora", base, experts, peft_version="0.17.1", enable_softmax=False, top_k_lora=2,
        enable_softmax_topk=True, scaling_pass_value=0.3,
    )  # fmt: skip
    spec = replace(quick(named_sources(experts), base), gate=gate, cache=CacheChoice.NONE, out=tmp_path / "bundle")
    manifest = build(spec).manifest
    assert manifest.gate is not None
    assert manifest.gate.topk_softmax is TopkSoftmax.FLATTENED
    assert manifest.gate.scaling_pass_row_per_length
    assert manifest.graphs[0].signature.carries == ()
    assert_wide_margin(manifest.reports[0].checks)
    parts = load(base, *named_sources(experts), gate=gate, topk=TopkSoftmax.FLATTENED)
    folder = copy_of(tmp_path / "bundle", tmp_path)

    def sequence_first(graph: ir.Graph) -> None:
        """Normalise over each token instead: what PEFT has done since 0.18."""
        changed = 0
        for op in ("ReduceMax", "ReduceSum"):
            for node in nodes(graph, op):
                axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] else None
                if axes is not None and axes.size == 3:
                    node.replace_input_with(1, constant(graph, [-1]))
                    changed += 1
        assert changed == 2

    edit_graph(folder, sequence_first)
    assert {"gate", "kld_mean"} <= failed(measured(parts, manifest.graphs[0], folder)).keys()


def test_ungated_gpt2(tmp_path: Path) -> None:
    """Conv1D weights lie transposed; without a gate every single expert is measured, and so is a mix."""
    base = write_lively_base(tmp_path / "base", "gpt2")
    experts = {
        name: write_lora(tmp_path / name, base, targets, rank, fan_in_fan_out=True, seed=rank)
        for name, targets, rank in (("math", ("c_attn", "c_fc"), 3), ("code", ("c_attn",), 2))
    }
    manifest = build(replace(quick(named_sources(experts), base), out=tmp_path / "bundle")).manifest
    assert manifest.gate is None
    assert {site.kind for site in manifest.sites} == {"conv1d"}
    [graph] = manifest.graphs
    scalings = graph.signature.input(SCALINGS)
    assert scalings is not None
    assert scalings.shape == ("B", "S", 1, 2)
    [report] = manifest.reports
    assert report.prompts == 4 * 4  # uneven mix, base, two experts
    assert_wide_margin(report.checks)
    assert report.adapters_matter > 0.05
