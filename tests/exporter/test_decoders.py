"""GPT-2, OPT, GPT-NeoX, Gemma3 text and Mixtral built whole, then run by the runtime, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.op_lint import lint
from exporter.reference import Reference
from runtime import GenerateOptions, Routed, complete, load
from runtime.backends import open_session
from runtime.manifest import Emit, Mode, SiteInfo
from runtime.replay import replay
from runtime.session import SessionSettings
from runtime.signature import CacheStyle
from tests.exporter.mutations import add, constant, copy_of, edit_graph, edit_weight, nodes, weight_names
from tests.exporter.peft_models import greedy, merged_model, peft_lora
from tests.exporter.tiny_builds import (
    DECODERS,
    FAMILIES,
    GATES,
    Built,
    Checkpoint,
    assert_wide_margin,
    build_family,
    difference,
    failed,
    measured,
    prompt,
    reference_of,
    shown,
)
from tests.same_tokens import Logits, Ties, seen_logits

OWN = tuple(family for family in DECODERS if family not in FAMILIES)  # the others have these checks in test_families
# A trace takes ten seconds; a GPT-2 graph without a gate is among the quick tests of test_families.
NEW = [pytest.param(family, marks=pytest.mark.long) if family == "gpt2" else family for family in OWN]
EVERY = [*NEW, *(pytest.param(family, marks=pytest.mark.long) for family in FAMILIES)]
LOGITS = 1e-5  # |d| / (1 + |logit|)
MATTERS = 0.05
MIX = {"math": 0.7, "code": 0.3, "prose": -0.4}
PROMPTS = [prompt(length, seed=length) for length in (3, 12, 8, 20)]  # below, at and beyond the windows of 8
NEW_TOKENS = 10
GREEDY = GenerateOptions(max_new_tokens=NEW_TOKENS)
Build = Callable[[str], Built]


@pytest.mark.parametrize("family", NEW)
def test_portable_graph_is_the_reference(family: str, family_build: Build) -> None:
    manifest = family_build(family).bundle.manifest
    assert manifest.base.model_type == family
    own = "conv1d" if family == "gpt2" else "linear"
    assert {site.kind for site in manifest.sites} == {own, "embedding", "lm_head"}
    [graph], [report] = manifest.graphs, manifest.reports
    assert (graph.opset, graph.signature.cache_style) == (18, CacheStyle.APPEND)
    assert_wide_margin(report.checks)
    values = {check.name: check.value for check in report.checks}
    assert {"logits", "gate", "kld_mean", "argmax_flips", "greedy_tokens"} == values.keys()
    assert values["logits"] <= LOGITS
    assert report.adapters_matter > 0.5
    assert report.prefill_positions / report.prompts > 8, "prompts must be longer than the sliding windows"


@pytest.mark.parametrize("family", NEW)
def test_old_tensorrt_may_take_the_graph(family: str, family_build: Build) -> None:
    assert lint(ir.load(family_build(family).bundle.root / "dynamic.onnx")) == ()


@pytest.mark.parametrize("family", NEW)
def test_every_parameter_lies_in_the_store_once(family: str, family_build: Build) -> None:
    """Under the name the model has for it: transformers renames GPT-NeoX's head and stacks Mixtral's block experts."""
    built = family_build(family)
    stored = weight_names(built.bundle.root)
    assert len(stored) == len(set(stored))
    assert {name for name, _ in built.checkpoint.parts().model.named_parameters()} <= set(stored)
    graph = ir.load(built.bundle.root / "dynamic.onnx").graph
    for value in graph.initializers.values():
        assert {use.node.op_type for use in value.uses()} != {"Transpose"}, "an engine would copy this when it loads"


def session_logits(built: Built, tokens: Sequence[int], row: Sequence[float]) -> np.ndarray[Any, Any]:
    """[T, V] of the dynamic graph under constant scalings: a prompt, then one cached step a token of its own."""
    [graph] = built.bundle.manifest.graphs
    scalings = graph.signature.input("scalings")
    assert scalings is not None
    session = open_session("ort", built.bundle.root / graph.path, graph.signature, SessionSettings(128, threads=1))
    try:
        wide = np.broadcast_to(np.array(row, np.float32), (int(scalings.shape[2]), len(row)))
        [run] = replay(session, [tokens], 4, wide, is_gated=False)
        return np.concatenate([np.array(run.tokens[:-1], np.float32)[:, None], run.logits], axis=1)
    finally:
        session.close()


def apart(reference: Reference, answer: np.ndarray[Any, Any], row: Sequence[float]) -> float:
    """How far the logits of a session's answer are from the reference's for its tokens."""
    tokens, got = answer[:, 0].astype(int).tolist(), answer[:, 1:]
    want = reference.constant(list(row), tokens).logits.numpy()
    return float((np.abs(got - want) / (1 + np.abs(want))).max())


@pytest.mark.parametrize("family", [*NEW, *FAMILIES])
def test_experts_alone_and_mixed_are_the_reference(family: str, family_build: Build) -> None:
    """And whichever of three experts is left out is missed."""
    built = family_build(family)
    reference = reference_of(built.checkpoint.parts())
    rows = [*np.eye(3).tolist(), list(MIX.values())]
    for row in rows:
        answer = session_logits(built, PROMPTS[3], row)
        assert apart(reference, answer, row) <= LOGITS
        assert apart(reference, answer, [0.0] * 3) > MATTERS
        for column in (column for column in range(3) if row[column]):
            assert apart(reference, answer, [0.0 if e == column else s for e, s in enumerate(row)]) > MATTERS


# --- one bug a family, put into a right graph ---


def positions_one_off(folder: Path, _: Sequence[SiteInfo]) -> None:
    """OPT's table begins with two rows that no token has."""
    edit_weight(folder, "model.decoder.embed_positions.weight", lambda rows: np.roll(rows, -1, axis=0))


def queries_and_keys_exchanged(folder: Path, _: Sequence[SiteInfo]) -> None:
    """GPT-2's Conv1D holds queries, keys and values side by side, [in, 3 * out]."""

    def exchange(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        query, key, value = np.split(weight, 3, axis=1)
        return np.concatenate([key, query, value], axis=1)

    edit_weight(folder, "transformer.h.0.attn.c_attn.weight", exchange)


def heads_not_interleaved(folder: Path, _: Sequence[SiteInfo]) -> None:
    """GPT-NeoX's fused rows are heads of query, key, value; another library's are queries, keys, values of heads."""

    def reorder(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return weight.reshape(4, 3, 8, 32).transpose(1, 0, 2, 3).reshape(96, 32)

    edit_weight(folder, "gpt_neox.layers.1.attention.query_key_value.weight", reorder)


def one_rope_for_both_kinds_of_block(folder: Path, _: Sequence[SiteInfo]) -> None:
    """Gemma3's windowed blocks turn positions faster than the others."""

    def edit(graph: ir.Graph) -> None:
        floats = [value for value in graph.initializers.values() if value.const_value is not None]
        ropes = [v for v in floats if v.const_value.size == 8 and v.dtype is ir.DataType.FLOAT]  # type: ignore[union-attr]
        first, second = (v for v in ropes if not isinstance(v.const_value, ir.ExternalTensor))
        second.replace_all_uses_with(first)

    edit_graph(folder, edit)


def all_block_experts_chosen(folder: Path, _: Sequence[SiteInfo]) -> None:
    """Mixtral's router gives the best two of four block experts a weight; here the last two get it."""

    def edit(graph: ir.Graph) -> None:
        for node in (node for node in nodes(graph, "TopK") if node.outputs[1].uses()):
            [use] = [use for use in node.outputs[1].uses() if use.node.op_type != "Cast"][:1]
            wrong = add(graph, "Sub", constant(graph, [3]), node.outputs[1])
            use.node.replace_input_with(use.idx, wrong)

    edit_graph(folder, edit)


MUTANTS = {
    "gpt2": queries_and_keys_exchanged,
    "opt": positions_one_off,
    "gpt_neox": heads_not_interleaved,
    "gemma3_text": one_rope_for_both_kinds_of_block,
    "mixtral": all_block_experts_chosen,
}


@pytest.mark.parametrize("family", NEW)
def test_family_mutant_is_caught(family: str, family_build: Build, tmp_path: Path) -> None:
    built = family_build(family)
    manifest, parts = built.bundle.manifest, built.checkpoint.parts()
    folder = copy_of(built.bundle.root, tmp_path)
    assert_wide_margin(measured(parts, manifest.graphs[0], folder).checks)
    MUTANTS[family](folder, manifest.sites)
    caught = failed(measured(parts, manifest.graphs[0], folder))
    assert {"logits", "kld_mean"} <= caught.keys()
    assert all(caught[name].value > 10 * caught[name].limit for name in ("logits", "kld_mean")), shown(
        [*caught.values()]
    )


# --- through the runtime ---


def run(bundle: Path, rows: Sequence[Routed]) -> dict[int, Logits]:
    """What each row's greedy tokens are chosen from; all rows of the dynamic graph are one batch."""
    with load(bundle, threads=1) as model, seen_logits() as seen:
        complete(model, rows, GREEDY)
    return seen


def expert_folder(checkpoint: Checkpoint, name: str) -> Path:
    return checkpoint.base.parent / "experts" / name


@pytest.mark.parametrize("family", EVERY)
def test_tokens_are_those_of_transformers(family: str, family_build: Build) -> None:
    """`generate` on the merged model with transformers' own cache; the expert on both ends of a tie is not merged."""
    checkpoint, ties = family_build(family).checkpoint, Ties()
    models = {
        "code": merged_model(checkpoint.base, expert_folder(checkpoint, "code")),
        "prose": peft_lora(checkpoint.base, expert_folder(checkpoint, "prose")),
    }
    one = 1 / GATES[family].get("global_scaling_weight", 1.0)  # a gate's own factor is on its experts alone, too
    asked = [(name, ids) for name in models for ids in PROMPTS]
    seen = run(family_build(family).bundle.root, [Routed(ids, mix={name: one}) for name, ids in asked])
    for place, (name, ids) in enumerate(asked):
        ties.compare(greedy(models[name], ids, NEW_TOKENS), seen[place], f"{name}, row {place}")
    ties.check()
    base = run(family_build(family).bundle.root, [Routed(ids, "base") for ids in PROMPTS])
    assert min(difference(base[n][0], seen[n + 4 * e][0]) for n in range(4) for e in range(2)) > MATTERS


def gated_tokens(reference: Reference, ids: Sequence[int]) -> Logits:
    """What X-LoRA's greedy tokens are chosen from, the whole sequence computed anew for each."""
    tokens, found = list(ids), []
    while len(found) < NEW_TOKENS and not (found and tokens[-1] == reference.model.config.eos_token_id):
        found.append(reference.gated(tokens).logits[-1].numpy())
        tokens.append(int(found[-1].argmax()))
    return found


@pytest.mark.parametrize("family", EVERY)
def test_rows_of_a_mixed_batch_are_as_alone(family: str, family_build: Build) -> None:
    """Base, one expert, a mix and two under the gate, of other lengths: rows cross the window at different steps."""
    built, ties = family_build(family), Ties()
    rows = [
        Routed(PROMPTS[0], "base"),
        Routed(PROMPTS[1], "prose"),
        Routed(PROMPTS[2], mix=MIX),
        Routed(PROMPTS[3], "xlora"),
        Routed(PROMPTS[0], "xlora"),
    ]
    together = run(built.bundle.root, rows)
    for place, row in enumerate(rows):
        ties.compare(run(built.bundle.root, [row])[0], together[place], f"row {place}")
    reference = reference_of(built.checkpoint.parts())
    for place in (3, 4):
        ties.compare(gated_tokens(reference, rows[place].prompt), together[place], f"row {place} and torch")
    ties.check()
    assert difference(together[0][0], together[4][0]) > MATTERS


# --- other modes ---


@pytest.mark.long
@pytest.mark.parametrize("family", DECODERS)
def test_static_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    one = 1 / GATES[family].get("global_scaling_weight", 1.0)
    built = build_family(tmp_path, family, modes=(Mode.STATIC,), mix={"code": one})
    [report] = built.bundle.manifest.reports
    assert {check.name: check.value for check in report.checks}["logits"] <= LOGITS
    model, ties = merged_model(built.checkpoint.base, expert_folder(built.checkpoint, "code")), Ties()
    seen = run(built.bundle.root, [Routed(ids) for ids in PROMPTS])
    for place, ids in enumerate(PROMPTS):
        ties.compare(greedy(model, ids, NEW_TOKENS), seen[place], str(place))
    ties.check()


@pytest.mark.long
@pytest.mark.parametrize("family", OWN)
def test_dynamic_and_static_in_one_build(family: str, tmp_path: Path) -> None:
    built = build_family(tmp_path, family, modes=(Mode.STATIC, Mode.DYNAMIC), mix=MIX)
    for report in built.bundle.manifest.reports:
        assert_wide_margin(report.checks)
        assert {check.name: check.value for check in report.checks}["logits"] <= LOGITS
        assert report.adapters_matter > 0.5
    assert {name for name in weight_names(built.bundle.root) if name.startswith("static/")} == {
        f"static/{site.path}.weight" for site in built.bundle.manifest.sites
    }


@pytest.mark.long
@pytest.mark.parametrize("family", OWN)
def test_modern_graph_is_the_reference(family: str, tmp_path: Path) -> None:
    built = build_family(tmp_path, family, emit=Emit.MODERN)
    [graph], [report] = built.bundle.manifest.graphs, built.bundle.manifest.reports
    assert (graph.opset, graph.signature.cache_style) == (24, CacheStyle.ALIAS)
    assert_wide_margin(report.checks)
    operators = {node.op_type for node in ir.load(built.bundle.root / "dynamic.onnx").graph}
    assert {"Attention", "TensorScatter"} <= operators
    ties, rows = Ties(), [Routed(PROMPTS[1], "prose"), Routed(PROMPTS[3], "xlora"), Routed(PROMPTS[0], "base")]
    seen, reference = run(built.bundle.root, rows), reference_of(built.checkpoint.parts())
    ties.compare(gated_tokens(reference, PROMPTS[3]), seen[1], "xlora")
    oracle = peft_lora(built.checkpoint.base, expert_folder(built.checkpoint, "prose"))
    ties.compare(greedy(oracle, PROMPTS[1], NEW_TOKENS), seen[0], "prose")
    ties.check()
