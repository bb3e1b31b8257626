"""DoRA, AdaLoRA and replaced weights are PEFT's: in the oracle, folded, and switched on at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.build_bundle import build
from exporter.errors import ExportError
from exporter.inputs import read_inputs
from exporter.learn_mix import learn_mix
from exporter.parts import load_parts
from exporter.spec import BuildSpec, DType, LearnSpec, OpChoice
from runtime.backends import open_session
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.manifest import MergeInfo, MergeMethod, MixInfo, Mode
from runtime.replay import replay
from runtime.routing import routing_for
from runtime.session import SessionSettings
from tests.exporter.checkpoint_makers import load_model, write_adalora, write_adapter, write_dora, write_lora
from tests.exporter.tiny_builds import (
    ATTENTION,
    MLP,
    difference,
    load,
    named_sources,
    prompt,
    quick,
    reference_of,
    write_lively_base,
)

LOGITS = 1e-5  # |d| / (1 + |logit|)
MATTERS = 0.05
TOKENS = prompt(13)

KEPT = {
    "model.layers.0.self_attn.q_proj": [True, False, True, True],
    "model.layers.0.mlp.up_proj": [False] * 4,
    "model.layers.1.self_attn.q_proj": [False, False, True, False],
    "model.layers.1.mlp.up_proj": [True] * 4,
}
Writer = Callable[..., Path]
# family -> kinds of adapters and what they touch
KINDS: dict[str, tuple[str, Writer, dict[str, Any]]] = {
    "DoRA": ("llama", write_dora, {"targets": (*ATTENTION, *MLP)}),
    "DoRA, rsLoRA and patterns": (
        "llama",
        write_dora,
        {
            "targets": ("q_proj", "down_proj"), "use_rslora": True, "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.mlp.down_proj": 1},
        },
    ),
    "DoRA on the ends": ("llama", write_dora, {"targets": ("embed_tokens", "lm_head", "v_proj")}),
    "DoRA on biases": ("qwen2", write_dora, {"targets": ATTENTION}),
    "DoRA on Conv1D": ("gpt2", write_dora, {"targets": ("c_attn", "c_fc", "c_proj"), "fan_in_fan_out": True}),
    "DoRA on fused projections": ("phi3", write_dora, {"targets": ("qkv_proj", "gate_up_proj", "down_proj")}),
    "DoRA on a scaled embedding": ("gemma2", write_dora, {"targets": ("embed_tokens", "o_proj")}),
    "AdaLoRA": ("llama", write_adalora, {"targets": ("q_proj", "up_proj")}),
    "AdaLoRA, pruned": ("llama", write_adalora, {"targets": ("q_proj", "up_proj"), "kept": KEPT}),
    "AdaLoRA, fields PEFT ignores": (
        "llama",
        write_adalora,
        {"targets": ("q_proj",), "r": 16, "use_rslora": True, "alpha_pattern": {"q_proj": 40}},
    ),
    "AdaLoRA on Conv1D": ("gpt2", write_adalora, {"targets": ("c_attn", "c_fc"), "fan_in_fan_out": True}),
    "LoRA on Conv1D": ("gpt2", write_lora, {"targets": ("c_attn", "c_proj"), "fan_in_fan_out": True}),
    "LoRA on fused projections": ("phi3", write_lora, {"targets": ("qkv_proj", "gate_up_proj")}),
}  # fmt: skip


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), str(adapter)).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return logits


def assert_is_peft(logits: Any, expected: torch.Tensor) -> None:
    assert float(((torch.as_tensor(logits) - expected).abs() / (1 + expected.abs())).max()) <= LOGITS


def logits_of(bundle: Bundle, graph: str, mix: Mapping[str, float] | None) -> np.ndarray[Any, Any]:
    """The bundle's own answer over the whole prompt, through ONNX Runtime."""
    info = next(info for info in bundle.manifest.graphs if info.name == graph)
    session = open_session("ort", bundle.root / info.path, info.signature, SessionSettings(128, threads=1))
    try:
        routing = routing_for(bundle.manifest, info, mix)
        [run] = replay(session, [TOKENS], 1, routing.row, is_gated=False)
        return run.logits
    finally:
        session.close()


@pytest.mark.parametrize("case", KINDS)
def test_the_oracle_is_peft(case: str, tmp_path: Path) -> None:
    family, write, settings = KINDS[case]
    base = write_lively_base(tmp_path / "base", family)
    path = write(tmp_path / "one", base, **settings)
    reference = reference_of(load(base, *named_sources({"one": path})))
    expected = peft_logits(base, path)
    assert_is_peft(reference.constant([1.0], TOKENS).logits, expected)
    assert difference(reference.constant([0.0], TOKENS).logits, expected) > MATTERS


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_both_graphs_are_peft(family: str, tmp_path: Path) -> None:
    """A DoRA, another DoRA, an AdaLoRA and a LoRA side by side: every one alone, linear ones mixed, DoRA folded."""
    base = write_lively_base(tmp_path / "base", family, num_hidden_layers=1)
    first, second, third = {
        "gpt2": (("c_attn", "c_fc"), ("c_attn",), ("c_fc",)),
        "phi3": (("qkv_proj", "down_proj"), ("qkv_proj",), ("gate_up_proj",)),
    }.get(family, (("q_proj", "v_proj", "embed_tokens", "lm_head"), ("q_proj", "down_proj"), ("v_proj", "up_proj")))
    turned = {"fan_in_fan_out": True} if family == "gpt2" else {}
    paths = {
        "dora": write_dora(tmp_path / "dora", base, first, seed=1, **turned),
        "other": write_dora(tmp_path / "other", base, second, seed=2, **turned),
        "ada": write_adalora(tmp_path / "ada", base, third, seed=3, **turned),
        "lora": write_lora(tmp_path / "lora", base, second, 2, seed=4, **turned),
    }
    spec = replace(quick(named_sources(paths), base), modes=(Mode.DYNAMIC, Mode.STATIC), mix={"dora": 1.0})
    bundle = build(replace(spec, out=tmp_path / "bundle"))
    assert [expert.kind.value for expert in bundle.manifest.experts] == ["dora", "dora", "adalora", "lora"]
    plain = logits_of(bundle, "dynamic", {})
    for name, path in paths.items():
        expected = peft_logits(base, path)
        assert_is_peft(logits_of(bundle, "dynamic", {name: 1.0}), expected)
        assert difference(plain, expected) > MATTERS
    assert_is_peft(logits_of(bundle, "static", None), peft_logits(base, paths["dora"]))
    graph = bundle.manifest.graphs[0]
    for mix in ({"dora": 0.5}, {"dora": 1.0, "lora": 0.1}, {"dora": 1.0, "other": 1.0}):
        with pytest.raises(InputError, match="cannot be mixed: DoRA divides the changed weight by its norm"):
            routing_for(bundle.manifest, graph, mix)
    routing_for(bundle.manifest, graph, {"ada": 0.5, "lora": 2.0, "dora": 0.0})


@pytest.mark.parametrize("settings", [{"dtype": DType.FLOAT16}, {"site_op": OpChoice.PLUGIN}], ids=str)
def test_dora_is_rounded_and_stands_beside_plugins(settings: dict[str, Any], tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", "qwen2", num_hidden_layers=1)
    paths = {
        "dora": write_dora(tmp_path / "dora", base, ("q_proj", "v_proj"), seed=1),
        "lora": write_lora(tmp_path / "lora", base, ("q_proj",), 2, seed=2),
    }
    bundle = build(replace(quick(named_sources(paths), base), out=tmp_path / "bundle", **settings))
    assert all(check.passed for report in bundle.manifest.reports for check in report.checks)
    assert bundle.manifest.reports[0].checks


# --- replaced weights: modules_to_save and trainable_token_indices ---

REPLACED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "head and norms": ({"modules_to_save": ["lm_head", "norm"]}, {}),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, {}),
    "a container": ({"modules_to_save": ["layers.1.mlp"]}, {}),
    "tied embedding": ({"modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True}),
    "tied head": ({"modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}),
    "tokens": ({"trainable_token_indices": [TOKENS[0], 5, TOKENS[3]]}, {}),
    "tied tokens": ({"trainable_token_indices": [TOKENS[0], 5, TOKENS[3]]}, {"tie_word_embeddings": True}),
    "tokens of both ends": ({"trainable_token_indices": {"embed_tokens": [TOKENS[0]], "lm_head": [1, 7]}}, {}),
    "DoRA and a head": ({"modules_to_save": ["lm_head"], "use_dora": True}, {}),
}


BUILT = ("tied embedding", "tied head", "tied tokens", "DoRA and a head")


def write_replacing(folder: Path, base: Path, settings: Mapping[str, Any]) -> Path:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    return write_adapter(folder, base, config, seed=6)


@pytest.mark.parametrize("case", REPLACED)
def test_replaced_weights_are_pefts(case: str, tmp_path: Path) -> None:
    settings, sizes = REPLACED[case]
    base = write_lively_base(tmp_path / "base", **sizes)
    path = write_replacing(tmp_path / "one", base, settings)
    parts = load(base, *named_sources({"one": path}))
    reference = reference_of(parts)
    expected = peft_logits(base, path)
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    assert_is_peft(reference.constant([1.0], TOKENS).logits, expected)
    assert all((before[name] == value).all() for name, value in parts.model.state_dict().items())
    [expert] = parts.inputs.adapters.experts
    emptied = replace(parts.inputs.adapters, experts=(replace(expert, replacements={}),))
    assert difference(reference_of(parts, emptied).constant([1.0], TOKENS).logits, expected) > MATTERS
    if case in BUILT:
        bundle = build(replace(spec_of(base, {"one": path}, Mode.STATIC, {"one": 1.0}), out=tmp_path / "bundle"))
        assert_is_peft(logits_of(bundle, "static", None), expected)


def spec_of(base: Path, paths: Mapping[str, Path], mode: Mode, mix: dict[str, float] | None = None) -> BuildSpec:
    return replace(quick(named_sources(paths), base), modes=(mode,), mix=mix)


def test_what_cannot_be_mixed_is_refused_by_name(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    paths = {
        "dora": write_dora(tmp_path / "dora", base, ("q_proj",)),
        "head": write_replacing(tmp_path / "head", base, {"modules_to_save": ["lm_head"]}),
        "lora": write_lora(tmp_path / "lora", base),
    }
    static = Mode.STATIC
    refused: Sequence[tuple[BuildSpec, str]] = [
        (
            spec_of(base, paths, static, {"dora": 0.5}),
            r"--mix: dora cannot be mixed: DoRA .*; got dora=0.5; need dora=1",
        ),
        (spec_of(base, paths, static, {"dora": 1, "lora": 1}), "dora cannot be mixed"),
        (spec_of(base, paths, static, {"head": 0.5}), r"head cannot be mixed: it replaces lm_head.weight of the base"),
        (spec_of(base, paths, static, {"head": 1, "lora": 1}), "head cannot be mixed"),
        (spec_of(base, paths, Mode.DYNAMIC), r"--mode dynamic: head replaces lm_head.weight .* Fix: --mode static"),
    ]
    for spec, message in refused:
        with pytest.raises(InputError, match=message):
            read_inputs(spec)
    for mix in ({"dora": 1.0}, {"head": 1.0, "dora": 0.0}, {"lora": 0.3}):
        read_inputs(spec_of(base, paths, static, mix))
    merged = replace(spec_of(base, paths, static, {"dora": 1}), merge=MergeInfo(method=MergeMethod.SVD))
    with pytest.raises(InputError, match=r"--merge: dora is no plain sum of low-rank updates: DoRA rescales"):
        read_inputs(merged)
    saved = replace(spec_of(base, paths, static, {"head": 1}), save_adapter=tmp_path / "saved")
    with pytest.raises(InputError, match=r"--save-adapter: head is no plain sum of low-rank updates: it replaces"):
        read_inputs(saved)
    own = MixInfo(sites={"model.layers.0.self_attn.q_proj": {"head": 1.0}})
    with pytest.raises(InputError, match=r"--mix: head cannot have weights by module; got it replaces lm_head\.weight"):
        read_inputs(replace(spec_of(base, paths, static), mix=own))
    by_site = MixInfo(weights={"lora": 1.0}, sites={"model.layers.0.self_attn.q_proj": {"dora": 0.5}})
    with pytest.raises(InputError, match="dora cannot be mixed"):
        read_inputs(replace(spec_of(base, paths, static), mix=by_site))
    del paths["head"]
    (tmp_path / "data.jsonl").write_text('{"text": "a b"}\n' * 4)
    with pytest.raises(InputError, match="--adapters: dora cannot be mixed"):
        learn_mix(LearnSpec(tmp_path / "data.jsonl", named_sources(paths), str(base)))


def test_an_output_whose_weights_vanish_is_refused(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    spec = spec_of(base, {"dora": write_dora(tmp_path / "dora", base, ("q_proj",))}, Mode.DYNAMIC)
    inputs = read_inputs(spec)
    [expert] = inputs.adapters.experts
    [(path, delta)] = expert.deltas.items()
    broken = replace(expert, deltas={path: replace(delta, magnitude=torch.full_like(delta.b[:, 0], torch.inf))})
    adapters = replace(inputs.adapters, experts=(broken,))
    with pytest.raises(
        ExportError, match=r"norm of the changed weight, which is 0 in model\.layers\.0\.self_attn\.q_proj"
    ):
        load_parts(replace(inputs, adapters=adapters))


# --- different targets ---


def test_every_combination_of_targets_is_pefts(tmp_path: Path) -> None:
    """Three experts, each module touched by every subset of them, in one base: 8 subsets on 8 modules."""
    base = write_lively_base(tmp_path / "base", num_hidden_layers=2)
    touched = [f"model.layers.{block}.{name}" for block in range(2) for name in (
        "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj",
    )]  # fmt: skip
    names = ("dora", "ada", "lora")
    own = {name: [path for place, path in enumerate(touched) if place >> bit & 1] for bit, name in enumerate(names)}
    paths = {
        "dora": write_dora(tmp_path / "dora", base, own["dora"], seed=1),
        "ada": write_adalora(tmp_path / "ada", base, own["ada"], seed=2),
        "lora": write_lora(tmp_path / "lora", base, own["lora"], 3, seed=3),
    }
    bundle = build(replace(quick(named_sources(paths), base), out=tmp_path / "bundle"))
    by_path = {site.path: set(site.experts) for site in bundle.manifest.sites}
    assert {frozenset(by_path.get(path, ())) for path in touched} == {
        frozenset(name for bit, name in enumerate(names) if place >> bit & 1) for place in range(8)
    }
    for name, path in paths.items():
        assert_is_peft(logits_of(bundle, "dynamic", {name: 1.0}), peft_logits(base, path))
