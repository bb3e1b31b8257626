"""What a family's config may turn on (ropes, heads, biases, ties, norms, windows, routers), and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from exporter.build_bundle import build, estimate_bytes
from exporter.checkpoints import ModuleKind, describe_base
from exporter.dynamic import cache_shapes
from exporter.errors import ExportError
from exporter.graph_exports import export_dynamic
from exporter.inputs import read_inputs
from exporter.model_facts import refuse_untraceable
from exporter.spec import DType
from exporter.store import WeightStore
from runtime.backends import open_session
from runtime.errors import InputError, UserError
from runtime.manifest import Emit
from runtime.replay import replay
from runtime.session import SessionSettings
from tests.exporter.checkpoint_makers import edit_tensors, load_model, write_base, write_lora
from tests.exporter.peft_models import logits_of, peft_lora
from tests.exporter.tiny_builds import (
    DECODERS,
    Checkpoint,
    assert_wide_margin,
    difference,
    failed,
    load,
    measured,
    measured_precisely,
    named_sources,
    prompt,
    quick,
    reference_of,
    shown,
    write_checkpoint,
    write_lively_base,
)

LOGITS = 1e-5
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 30.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 100.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip

# name -> family and what its config says; all of them beyond what the builds of test_decoders have.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama: wide heads, one K/V head, biases, llama3, tied": (
        "llama",
        {
            "head_dim": 16, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2,
            "rope_parameters": ROPES["llama3"], "tie_word_embeddings": True,
        },
    ),
    "llama: narrow heads, yarn": ("llama", {"head_dim": 4, "rope_parameters": ROPES["yarn"]}),
    "mistral: no window, every head its own K/V": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2: windows in later blocks only": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 2}
    ),
    "qwen3: biases, linear rope, tied": (
        "qwen3",
        {"attention_bias": True, "head_dim": 12, "rope_parameters": ROPES["linear"], "tie_word_embeddings": True},
    ),
    "gemma2: another query scale, untied": ("gemma2", {"query_pre_attn_scalar": 20, "tie_word_embeddings": False}),
    "gemma3: a window of 4, biases": (
        "gemma3_text", {"sliding_window": 4, "attention_bias": True, "num_hidden_layers": 2}
    ),
    "phi3: half of a head turns": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 5}),
    "gpt2: scores scaled by block, untied": (
        "gpt2",
        {
            "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "tie_word_embeddings": False,
            "activation_function": "relu", "n_layer": 2,
        },
    ),
    "opt: as the larger ones": (
        "opt", {"do_layer_norm_before": True, "word_embed_proj_dim": 32, "tie_word_embeddings": False}
    ),
    "opt: no biases, plain norms": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "gpt_neox: in sequence, all of a head turns, tied": (
        "gpt_neox",
        {
            "use_parallel_residual": False, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0},
        },
    ),
    "gpt_neox: no biases, linear rope": (
        "gpt_neox",
        {"attention_bias": False, "rope_parameters": ROPES["linear"] | {"partial_rotary_factor": 0.5}},
    ),
    "mixtral: one of three, tied, no window": (
        "mixtral",
        {
            "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": None, "tie_word_embeddings": True,
            "output_router_logits": True,
        },
    ),
}  # fmt: skip
QUICK = ("llama: wide heads, one K/V head, biases, llama3, tied", "opt: as the larger ones")


def assert_exported(folder: Path, family: str, sizes: Mapping[str, Any]) -> None:
    """The gated graph of one block, or as many as asked for, is the reference; with a changed expert it is not."""
    blocks = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    checkpoint = write_checkpoint(folder, family, **blocks | dict(sizes))
    parts, spec = checkpoint.parts(), checkpoint.spec()
    graph = export_dynamic(parts, spec, DType.FLOAT32, WeightStore(folder)).info
    report = measured(parts, graph, folder)
    assert_wide_margin(report.checks)
    if family == "gemma2":  # torch's own fp32 has been 2e-5 from fp64 products here
        report = measured_precisely(parts, graph, folder)
    assert report.checks[0].value <= LOGITS, shown(report.checks)
    assert report.adapters_matter > 0.1
    first = parts.inputs.adapters.experts[0]
    less = tuple(replace(delta, scale=0.5 * delta.scale) for delta in first.deltas.values())
    experts = (replace(first, deltas=dict(zip(first.deltas, less, strict=True))), *parts.inputs.adapters.experts[1:])
    other = replace(parts, inputs=replace(parts.inputs, adapters=replace(parts.inputs.adapters, experts=experts)))
    assert "logits" in failed(measured(other, graph, folder))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CONFIGS]
)
def test_config_is_exported(name: str, tmp_path: Path) -> None:
    assert_exported(tmp_path, *CONFIGS[name])


def rope(names: tuple[str, ...] = tuple(ROPES), **more: Any) -> SearchStrategy[dict[str, Any]]:
    return st.sampled_from(names).map(lambda name: ROPES[name] | more)


HEADS = {"head_dim": st.sampled_from([4, 8, 12, 16]), "num_key_value_heads": st.sampled_from([1, 2, 4])}
# A norm over 4 numbers near zero magnifies rounding: 6e-8 of the weights have moved logits by 3e-5, the bound is 1e-5.
NORMED_HEADS = HEADS | {"head_dim": st.sampled_from([8, 12, 16])}
WINDOW = st.sampled_from([3, 8, 13])
EPS = st.sampled_from([1e-6, 1e-5, 1e-2])
SPACES: dict[str, dict[str, SearchStrategy[Any]]] = {
    "llama": HEADS | {
        "rope_parameters": rope(), "attention_bias": st.booleans(), "mlp_bias": st.booleans(), "rms_norm_eps": EPS,
    },
    "mistral": HEADS | {"sliding_window": st.none() | WINDOW, "rope_parameters": rope(), "rms_norm_eps": EPS},
    "qwen2": {
        "num_key_value_heads": HEADS["num_key_value_heads"], "rope_parameters": rope(), "rms_norm_eps": EPS,
        "use_sliding_window": st.booleans(), "sliding_window": WINDOW, "max_window_layers": st.sampled_from([0, 1]),
        "num_hidden_layers": st.just(2),
    },
    "qwen3": NORMED_HEADS | {"rope_parameters": rope(), "attention_bias": st.booleans(), "rms_norm_eps": EPS},
    "gemma2": HEADS | {
        "query_pre_attn_scalar": st.sampled_from([8, 20]), "sliding_window": WINDOW, "num_hidden_layers": st.just(2),
    },
    "gemma3_text": NORMED_HEADS | {
        "sliding_window": WINDOW, "attention_bias": st.booleans(), "num_hidden_layers": st.just(2),
    },
    "phi3": {
        "num_key_value_heads": HEADS["num_key_value_heads"], "sliding_window": st.none() | WINDOW,
        "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
    },
    "gpt2": {
        "scale_attn_by_inverse_layer_idx": st.booleans(), "scale_attn_weights": st.booleans(), "n_layer": st.just(2),
        "activation_function": st.sampled_from(["gelu_new", "relu", "silu"]), "layer_norm_epsilon": EPS,
    },
    "opt": {
        "word_embed_proj_dim": st.sampled_from([16, 32, 48]), "do_layer_norm_before": st.booleans(),
        "enable_bias": st.booleans(), "layer_norm_elementwise_affine": st.booleans(),
    },
    "gpt_neox": {
        "rope_parameters": st.sampled_from([0.25, 0.5, 1.0]).flatmap(lambda part: rope(partial_rotary_factor=part)),
        "use_parallel_residual": st.booleans(), "attention_bias": st.booleans(), "layer_norm_eps": EPS,
    },
    "mixtral": HEADS | {
        "num_local_experts": st.sampled_from([3, 5]), "num_experts_per_tok": st.sampled_from([1, 2, 3]),
        "sliding_window": st.none() | WINDOW, "rope_parameters": rope(), "rms_norm_eps": EPS,
    },
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("family", DECODERS)
def test_random_configs_are_exported(family: str, tmp_path: Path) -> None:
    drawn = iter(range(100))
    ends = {"tie_word_embeddings": st.booleans()}

    @settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(st.fixed_dictionaries(SPACES[family] | ends))
    def check(sizes: dict[str, Any]) -> None:
        print(family, sizes)
        assert_exported(tmp_path / str(next(drawn)), family, sizes)

    check()


@pytest.mark.long
def test_bfloat16_shards_are_exported(tmp_path: Path) -> None:
    """As large checkpoints come; the graph holds the same numbers as fp32, exactly."""
    folder = write_lively_base(tmp_path / "one", "mixtral", num_hidden_layers=1)
    load_model(folder, torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(describe_base(str(tmp_path / "base")).files) > 1
    paths = {"one": write_lora(tmp_path / "lora", tmp_path / "base", ("q_proj", "o_proj"), 3)}
    bundle = build(replace(quick(named_sources(paths), tmp_path / "base"), out=tmp_path / "bundle"))
    assert bundle.manifest.reports[0].checks[0].value <= LOGITS
    parts = load(tmp_path / "base", *named_sources(paths))
    tokens = prompt(13)
    expected = logits_of(peft_lora(tmp_path / "base", tmp_path / "lora"), tokens)
    assert difference(reference_of(parts).constant([1.0], tokens).logits, expected) < 1e-4


# --- what the config says is not what the model does ---


def test_caches_are_as_the_model_fills_them(tmp_path: Path) -> None:
    """GPT-NeoX reads no num_key_value_heads, whatever its config holds."""
    base = write_base(tmp_path / "base", "gpt_neox", num_key_value_heads=1)
    assert json.loads((base / "config.json").read_text())["num_key_value_heads"] == 1
    assert cache_shapes(load_model(base)) == [(4, 8)] * 2
    assert cache_shapes(load_model(write_base(tmp_path / "llama", "llama", head_dim=12))) == [(2, 12)] * 2


def test_space_for_block_experts_is_asked_for(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "mixtral", dtype="bfloat16")
    spec = quick(named_sources({"one": write_lora(tmp_path / "one", base, ("q_proj",), 2)}), base)
    numbers = sum(parameter.numel() for parameter in load_model(base).parameters())
    assert estimate_bytes(spec, read_inputs(spec)) >= 4 * numbers + (64 << 20)


def test_a_gate_reads_what_the_head_reads(tmp_path: Path) -> None:
    """OPT projects its last hidden state: 24 wide here, while the blocks are 32 wide."""
    checkpoint = write_checkpoint(tmp_path, "opt")
    base = describe_base(str(checkpoint.base))
    assert (base.gate_width, base.hidden_size) == (24, 32)
    wrong = Checkpoint(checkpoint.base, tmp_path / "wrong")
    (tmp_path / "wrong").mkdir()
    config = json.loads((checkpoint.xlora / "adapter_config.json").read_text())
    (wrong.xlora / "adapter_config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    (wrong.xlora / "adapter_model.safetensors").write_bytes(
        (checkpoint.xlora / "adapter_model.safetensors").read_bytes()
    )

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            tensors[name] = torch.cat([value, value[:, :8]], 1) if name.endswith(".weight") else value

    edit_tensors(wrong.xlora / "adapter_model.safetensors", widen)
    with pytest.raises(UserError, match=r"got 32; need 24, the width of the base's last hidden state"):
        read_inputs(wrong.spec())


def test_a_head_under_another_name_in_the_files_is_compared(tmp_path: Path) -> None:
    """GPT-NeoX's files say embed_out: what PEFT saves beside a LoRA on lm_head must equal that."""
    base = write_base(tmp_path / "base", "gpt_neox")
    path = write_lora(tmp_path / "one", base, ("lm_head", "dense"), 2)
    spec = quick(named_sources({"one": path}), base)
    assert describe_base(str(base)).stored_names == {"lm_head.weight": "embed_out.weight"}
    assert "expert:one: lm_head.weight is saved beside the LoRA and equals the base's" in read_inputs(spec).notes
    edit_tensors(base / "model.safetensors", lambda tensors: tensors["embed_out.weight"].mul_(1.01))
    with pytest.raises(UserError, match=r"its values are not those of lm_head\.weight in the base"):
        read_inputs(spec)


# --- what is refused, by name and before any weight is read ---


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, r"tokens of gemma3_text see later ones; got use_bidir"),
        ("gpt2", {"add_cross_attention": True}, r"gpt2 has cross-attention; got add_cross_attention=True"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' changes"),
        ("mixtral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        (
            "phi3",
            {"rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            }, "max_position_embeddings": 256, "original_max_position_embeddings": 128},
            "rope_type 'longrope' changes with the sequence length",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            }},
            "rope_type 'dynamic'",
        ),
    ],
)  # fmt: skip
def test_configs_are_refused_by_name(family: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = describe_base(str(write_base(tmp_path / "base", family, **config)))
    with pytest.raises(ExportError, match=message):
        refuse_untraceable(base, Emit.PORTABLE)


@pytest.mark.parametrize(
    ("family", "own", "message"),
    [
        ("opt", "model.decoder.embed_positions", "embed_positions is a OPTLearnedPositionalEmbedding"),
        ("mixtral", "model.layers.0.mlp.gate", r"module model\.layers\.0\.mlp\.gate is a MixtralTopKRouter"),
        ("mixtral", "model.layers.0.mlp.experts", r"1 modules do not exist in the base; got .*mlp\.experts"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1", r"1 modules do not exist in the base; got .*w1"),
        ("gpt_neox", "embed_out", r"1 modules do not exist in the base; got embed_out"),
    ],
)
def test_modules_no_lora_can_stand_on_are_refused_by_name(family: str, own: str, message: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family)
    path = write_lora(tmp_path / "one", base, ("dense",) if family == "gpt_neox" else ("q_proj",), 2)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith("lora_A.weight"))
        for side in "AB":
            tensors[f"base_model.model.{own}.lora_{side}.weight"] = tensors.pop(name.replace("lora_A", f"lora_{side}"))

    edit_tensors(path / "adapter_model.safetensors", rename)
    config = json.loads((path / "adapter_config.json").read_text())
    config["target_modules"] = sorted({*config["target_modules"], own.rpartition(".")[2]})
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        read_inputs(quick(named_sources({"one": path}), base))


def test_learned_positions_are_no_plain_lookup_in_opt(tmp_path: Path) -> None:
    """OPT's are called with a mask and looked up two further; GPT-2's are an Embedding like any other."""
    opt = describe_base(str(write_base(tmp_path / "opt", "opt")))
    gpt2 = describe_base(str(write_base(tmp_path / "gpt2", "gpt2")))
    assert opt.modules["model.decoder.embed_positions"].kind is ModuleKind.OTHER
    assert opt.modules["model.decoder.embed_tokens"].kind is ModuleKind.EMBEDDING
    assert gpt2.modules["transformer.wpe"].kind is ModuleKind.EMBEDDING


def test_models_with_other_caches_are_refused_by_name() -> None:
    """DeepSeek caches what its keys and values are made from, in two widths; Bloom adds to its scores by head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"block 0: this model changes keys and values after caching them"):
        cache_shapes(AutoModelForCausalLM.from_config(config).eval())
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(ExportError, match=r"base: this bloom model cannot be traced as it is; got \w+: "):
        cache_shapes(AutoModelForCausalLM.from_config(config).eval())


def test_models_with_attention_of_their_own_are_refused_by_name() -> None:
    """GPT-J fills any cache it is given and would then attend to the new tokens alone, later ones too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gptj", n_embd=32, n_layer=1, n_head=2, rotary_dim=4, vocab_size=64, n_positions=16)
    with pytest.raises(ExportError, match=r"base: gptj computes its attention by code of its own; need attention thro"):
        cache_shapes(AutoModelForCausalLM.from_config(config).eval())


def test_learned_positions_end_where_the_table_ends(tmp_path: Path) -> None:
    """The last position of OPT's table is used, and padding beside it reads no row beyond."""
    base = write_lively_base(tmp_path / "base", "opt", num_hidden_layers=1, max_position_embeddings=16)
    paths = {"one": write_lora(tmp_path / "one", base, ("q_proj", "fc1"), 2)}
    assert math.prod(load_model(base).model.decoder.embed_positions.weight.shape) == 18 * 32
    parts, spec = load(base, *named_sources(paths)), quick(named_sources(paths), base)
    graph = export_dynamic(parts, spec, DType.FLOAT32, WeightStore(tmp_path)).info
    session = open_session("ort", tmp_path / graph.path, graph.signature, SessionSettings(16, threads=1))
    try:
        runs = replay(session, [prompt(12), prompt(3, seed=1)], 5, np.ones((1, 1), np.float32), is_gated=False)
    finally:
        session.close()
    for run in runs:
        want = reference_of(parts).constant([1.0], run.tokens[:-1]).logits
        assert difference(run.logits, want) < 1e-4
    assert len(runs[0].tokens) - 1 == 16
