"""Graphs of which one block of each kind was traced: the same as when all of them are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from torch import nn

from exporter import graphs
from exporter.blocks import Blocks, find_blocks
from exporter.build_bundle import build
from exporter.spec import BuildSpec, HotSpec
from runtime.backends import open_session
from runtime.bundle import Bundle
from runtime.manifest import Emit, GraphInfo, Mode, VerifyLevel
from runtime.replay import Replay, replay
from runtime.session import SessionSettings
from tests.exporter.checkpoint_makers import load_model, write_dora, write_lora
from tests.exporter.encoder_makers import write_random
from tests.exporter.mutations import weight_names
from tests.exporter.tiny_builds import named_sources, prompt, quick, write_gate, write_lively_base

pytestmark = pytest.mark.usefixtures("without_twin")

PROMPTS = [prompt(length, seed=length) for length in (5, 12)]
MIX = {"math": 0.7, "code": 0.3}


def uneven(folder: Path, family: str, blocks: int, **gate: Any) -> BuildSpec:
    """Every site has scalings of its own; the second expert leaves out the last block but one."""
    base = write_lively_base(folder / "base", family, num_hidden_layers=blocks)
    some = "|".join(str(number) for number in range(blocks) if number != blocks - 2)
    experts = {
        "math": write_lora(folder / "math", base, ("q_proj", "k_proj", "o_proj"), 2, seed=1),
        "code": write_lora(folder / "code", base, rf".*layers\.({some})\..*(q_proj|down_proj)", 3, seed=2),
    }
    sites = 3 * blocks + blocks - 1
    sources = write_gate(folder / "xlora", base, experts, sites=sites, **gate)
    return replace(quick(named_sources(experts), base), gate=sources, verify=VerifyLevel.STRUCTURE)


def built(spec: BuildSpec, out: Path, monkeypatch: pytest.MonkeyPatch, *, whole: bool) -> tuple[Bundle, list[Any]]:
    """The bundle, and what was found of each of its graphs."""
    found: list[Blocks | None] = []

    def find(*args: Any) -> Blocks | None:
        found.append(None if whole else find_blocks(*args))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "find_blocks", find)
        return build(replace(spec, out=out)), found


def answers(bundle: Bundle, graph: GraphInfo) -> list[Replay]:
    settings = SessionSettings(64, threads=1)
    session = open_session("ort", bundle.root / graph.path, graph.signature, settings)
    scalings = graph.signature.input("scalings")
    row = None if scalings is None else np.zeros(scalings.shape[2:], np.float32)
    try:
        return replay(session, PROMPTS, 4, row, is_gated=graph.mode is Mode.DYNAMIC)
    finally:
        session.close()


def operators(bundle: Bundle, graph: GraphInfo) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(bundle.root / graph.path).graph)


@pytest.mark.parametrize(
    ("family", "first", "settings"),
    [
        ("llama", (0, 1, 0), {}),
        pytest.param("llama", (0, 0, 2, 0), {"modes": (Mode.DYNAMIC, Mode.STATIC), "mix": MIX}, marks=pytest.mark.long),
        pytest.param("llama", (0, 0, 2, 0), {"emit": Emit.MODERN}, marks=pytest.mark.long),
        pytest.param("gemma2", (0, 1, 0, 1, 4, 1), {}, marks=pytest.mark.long),
    ],
)
def test_the_graph_is_that_of_a_whole_trace(
    family: str, first: tuple[int, ...], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(uneven(tmp_path, family, len(first)), **settings)
    ours, found = built(spec, tmp_path / "ours", monkeypatch, whole=False)
    whole, _ = built(spec, tmp_path / "whole", monkeypatch, whole=True)
    assert [None if blocks is None else blocks.first for blocks in found] == [first] * len(spec.modes)
    assert sorted(weight_names(ours.root)) == sorted(weight_names(whole.root))
    for graph, other in zip(ours.manifest.graphs, whole.manifest.graphs, strict=True):
        assert graph.signature == other.signature
        few, many = operators(ours, graph), operators(whole, other)
        assert few.total() <= many.total()
        assert {name for name in few | many if few[name] != many[name]} <= {"Unsqueeze", "Reshape", "Expand"}
        for mine, theirs in zip(answers(ours, graph), answers(whole, other), strict=True):
            assert mine.tokens == theirs.tokens
            assert np.abs(mine.logits - theirs.logits).max() <= 1e-6
            assert mine.gate is None or np.abs(mine.gate - theirs.gate).max() <= 1e-6


def outputs(bundle: Bundle, scalings: Callable[[Any], Any] = lambda row: row) -> list[Any]:
    """What the dynamic graph gives for seeded inputs of its signature, whatever these are."""
    graph = bundle.graph("dynamic")
    generator = np.random.default_rng(0)
    sizes = {"B": 2, "S": 5, "C": 9, "K": 2, "R": 6}
    most = {"input_ids": 60, "position_ids": 9, "cache_lengths": 4, "logit_index": 5, "lengths": 5, "token_type_ids": 2}
    feeds = {}
    for spec in graph.signature.inputs:
        shape = [sizes.get(size, size) for size in spec.shape]
        if spec.dtype == "int64":
            feeds[spec.name] = generator.integers(1, most.get(spec.name, 2), shape)
        else:
            feeds[spec.name] = 0.3 * generator.standard_normal(shape).astype(np.float32)
    if "lora_index" in feeds:
        feeds["lora_index"] = np.arange(sizes["R"]) % feeds["scalings"].shape[-1]
    feeds["scalings"] = scalings(feeds["scalings"])
    session = ort.InferenceSession(bundle.root / graph.path, providers=["CPUExecutionProvider"])
    return list(session.run([spec.name for spec in graph.signature.outputs], feeds))


def apart(left: list[Any], right: list[Any]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True) if a.size)


def without(expert: int) -> Callable[[Any], Any]:
    return lambda row: np.where(np.arange(row.shape[-1]) == expert, np.float32(0), row)


def require_same(ours: Bundle, whole: Bundle, experts: int) -> None:
    """Alike in signature, weights and operators, and in what they compute with every expert in it."""
    mine, theirs = ours.graph("dynamic"), whole.graph("dynamic")
    assert mine.signature == theirs.signature
    assert sorted(weight_names(ours.root)) == sorted(weight_names(whole.root))
    few, many = operators(ours, mine), operators(whole, theirs)
    assert {name for name in few | many if few[name] != many[name]} <= {"Unsqueeze", "Reshape", "Expand", "Shape"}
    expected = outputs(whole)
    assert apart(outputs(ours), expected) <= 1e-6
    for expert in range(experts):
        changed = outputs(whole, without(expert))
        assert apart(changed, expected) > 1e-3, f"expert {expert} changes nothing: the comparison would miss it"
        assert apart(outputs(ours, without(expert)), changed) <= 1e-6


@pytest.mark.parametrize(
    ("family", "classes", "path"),
    [
        pytest.param("bert", 0, "encoder.layer", marks=pytest.mark.long),
        pytest.param("xlm-roberta", 3, "roberta.encoder.layer", marks=pytest.mark.long),
        ("distilbert", 3, "distilbert.transformer.layer"),
        pytest.param("mpnet", 0, "encoder.layer", marks=pytest.mark.long),
    ],
)
def test_an_encoder_is_that_of_a_whole_trace(
    family: str, classes: int, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind a classifier's head, where the backbone is wrapped for the gate to see its last hidden state."""
    checkpoint = write_random(tmp_path, family, classes=classes, blocks=3)
    spec = checkpoint.spec(verify=VerifyLevel.STRUCTURE)
    ours, found = built(spec, tmp_path / "ours", monkeypatch, whole=False)
    whole, _ = built(spec, tmp_path / "whole", monkeypatch, whole=True)
    [blocks] = found
    assert blocks is not None
    assert (blocks.named, blocks.first) == (path, (0, 0, 0))
    require_same(ours, whole, 2)


@pytest.mark.parametrize(
    ("emit", "first", "targets"),
    [
        (Emit.PORTABLE, (0, 0), ()),
        pytest.param(Emit.PORTABLE, (0, 1, 0), (0, 2), marks=pytest.mark.long),
        pytest.param(Emit.MODERN, (0, 1, 0), (0, 2), marks=pytest.mark.long),
    ],
)
def test_a_graph_with_adapters_as_inputs_is_that_of_a_whole_trace(
    emit: Emit, first: tuple[int, ...], targets: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block reads its own adapters and its own rows of scales; the second of three has none on its MLP."""
    base = write_lively_base(tmp_path / "base", num_hidden_layers=len(first))
    allowed = ("q_proj", "v_proj", "lm_head", *(f"layers.{number}.mlp.down_proj" for number in targets))
    spec = replace(quick((), base), hot=HotSpec(8, 3, allowed), verify=VerifyLevel.STRUCTURE, emit=emit)
    ours, found = built(spec, tmp_path / "ours", monkeypatch, whole=False)
    whole, _ = built(spec, tmp_path / "whole", monkeypatch, whole=True)
    assert [None if blocks is None else blocks.first for blocks in found] == [first]
    require_same(ours, whole, 3)


def kinds(spec: BuildSpec, change: Callable[[Any], None] = lambda _: None) -> tuple[int, ...] | None:
    model = load_model(Path(str(spec.base)))
    change(model)
    names = {name: name for name, _ in model.named_parameters(remove_duplicate=False)}
    blocks = find_blocks(model, names, lambda _: None)
    return None if blocks is None else blocks.first


def share_a_norm(model: Any) -> None:
    model.model.layers[2].input_layernorm = model.model.layers[1].input_layernorm


def widen_a_head(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.5


def another_activation(model: Any) -> None:
    model.model.layers[3].mlp.act_fn = nn.GELU()


def buffer_of_its_own(model: Any) -> None:
    for number, layer in enumerate(model.model.layers):
        layer.register_buffer("shift", nn.Parameter(layer.input_layernorm.weight[:1] * 0 + number // 2).detach())


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda _: None, (0, 0, 0, 0)),
        (share_a_norm, (0, 1, 2, 0)),
        (widen_a_head, (0, 1, 0, 0)),
        (another_activation, (0, 0, 0, 3)),
        (buffer_of_its_own, (0, 0, 2, 2)),
    ],
)
def test_what_makes_a_block_another_kind(change: Callable[[Any], None], first: tuple[int, ...], tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=4)
    assert kinds(quick((), base), change) == first


def test_models_whose_blocks_differ_by_number_alone_are_traced_whole(tmp_path: Path) -> None:
    """GPT-2 may divide its scores by the number of the block, which its modules do not tell."""
    base = write_lively_base(tmp_path / "base", "gpt2", num_hidden_layers=2, scale_attn_by_inverse_layer_idx=True)
    assert kinds(quick((), base)) is None


def test_weights_that_lie_upright_in_one_block_are_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first graph stored decides how the next one reads it, block by block."""
    base = write_lively_base(tmp_path / "base", num_hidden_layers=3)
    sources = {
        "dora": write_dora(tmp_path / "dora", base, ("o_proj",), layers_to_transform=[0]),
        "plain": write_lora(tmp_path / "plain", base, ("v_proj",), 2),
    }
    modes = (Mode.DYNAMIC, Mode.STATIC)
    spec = replace(quick(named_sources(sources), base), modes=modes, mix={"plain": 1.0})
    bundle, found = built(spec, tmp_path / "out", monkeypatch, whole=False)
    assert found[0] is not None
    assert found[0].first == (0, 1, 1)
    names = [name.removesuffix(".T") for name in weight_names(bundle.root) if not name.startswith("static/")]
    assert len(names) == len(set(names))
