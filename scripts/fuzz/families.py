"""The families that are drawn: what their modules are called, and which fields of their configs are turned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ENDS = ("embed_tokens", "lm_head")
EPS = (1e-6, 1e-5, 1e-2)
BOTH = (False, True)
ACTS = ("silu", "gelu", "relu", "gelu_pytorch_tanh", "gelu_new", "relu2", "quick_gelu")
WINDOWS = (None, 3, 8, 13)
SCALES = (0.25, 1.0, 3.0)
ROPE_KINDS = ("default", "linear", "llama3", "yarn")

Draw = Callable[[Random, dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Family:
    """One model_type. `knobs`: field -> values to choose from, or a function of the draw so far."""

    attention: tuple[str, ...] = ATTENTION
    mlp: tuple[str, ...] = MLP
    ends: tuple[str, ...] = ENDS
    norms: tuple[str, ...] = ("norm",)  # short names of modules that modules_to_save may name
    knobs: Mapping[str, tuple[Any, ...] | Draw] = field(default_factory=dict)
    has_head_dim: bool = False  # a head_dim of its own; else the hidden size is heads * head_dim
    has_kv_heads: bool = True
    least_head_dim: int = 4
    has_rope: bool = True
    is_gpt2: bool = False  # n_embd, n_layer, ..; Conv1D
    tied: bool = False  # what the config's class says
    layers: str = "layers"  # PEFT's layers_pattern
    fits: bool = False  # heads * head_dim must be the hidden size although the config has a head_dim
    gate_mlp: bool = True  # PEFT's X-LoRA can gate the MLP's modules
    embedding: str = "embed_tokens"


def rope(rng: Random, kinds: tuple[str, ...] = ROPE_KINDS) -> dict[str, Any]:
    """One set of rope parameters."""
    kind = rng.choice(kinds)
    drawn: dict[str, Any] = {"rope_type": kind, "rope_theta": rng.choice((10.0, 100.0, 1e4))}
    if kind != "default":
        drawn["factor"] = rng.choice((1.75, 4.0))
    if kind == "llama3":
        drawn |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice((2.0, 4.0))}
    if kind in ("llama3", "yarn"):
        drawn["original_max_position_embeddings"] = rng.choice((16, 32))
    if kind == "yarn" and rng.random() < 0.5:
        drawn |= rng.choice(
            ({"attention_factor": 0.8}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"mscale": 1.2, "mscale_all_dim": 0.7})
        )
    return drawn


def a_rope(rng: Random, _: dict[str, Any]) -> dict[str, Any]:
    """All kinds that have a graph."""
    return rope(rng)


def partial_rope(rng: Random, _: dict[str, Any]) -> dict[str, Any]:
    """A rope that turns a part of each head."""
    return rope(rng, ("default", "linear")) | {"partial_rotary_factor": rng.choice((0.5, 1.0))}


def phi3_rope(rng: Random, _: dict[str, Any]) -> dict[str, Any]:
    """Its config takes no linear one."""
    return rope(rng, ("default",)) | {"partial_rotary_factor": rng.choice((0.5, 1.0))}


def two_ropes(rng: Random, _: dict[str, Any]) -> dict[str, Any]:
    """Of blocks with a window, and of those without."""
    return {"sliding_attention": rope(rng, ("default", "linear")), "full_attention": rope(rng)}


def mixed_layers(rng: Random, drawn: dict[str, Any]) -> list[str]:
    """A kind for each block."""
    return [rng.choice(("sliding_attention", "full_attention")) for _ in range(drawn["num_hidden_layers"])]


def no_rope_layers(rng: Random, drawn: dict[str, Any]) -> list[int]:
    """Which blocks have a rope."""
    return [rng.choice((0, 1)) for _ in range(drawn["num_hidden_layers"])]


def fits_heads(rng: Random, drawn: dict[str, Any]) -> int:
    """A scale of queries near the head's width."""
    return int(rng.choice((8, 20, 64)))


def half_width(rng: Random, drawn: dict[str, Any]) -> int:
    """OPT's words may be narrower or wider than its blocks."""
    return int(rng.choice((drawn["hidden_size"], 16, 24, 48)))


SWITCHED_WINDOW: dict[str, Any] = {
    "use_sliding_window": BOTH, "sliding_window": (3, 8, 13), "max_window_layers": (0, 1, 2),
}  # fmt: skip
GRANITE: dict[str, Any] = {
    "attention_bias": BOTH, "embedding_multiplier": SCALES, "logits_scaling": (1.0, 4.0),
    "residual_multiplier": (0.2, 1.0),
    "attention_multiplier": (0.1, 0.5, 1.0), "rms_norm_eps": EPS, "rope_parameters": a_rope, "hidden_act": ACTS,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": (3, 4), "num_experts_per_tok": (1, 2), "norm_topk_prob": BOTH}
ONE_ROPE: dict[str, Any] = {"rope_parameters": a_rope, "rms_norm_eps": EPS, "hidden_act": ACTS}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        has_head_dim=True, knobs=ONE_ROPE | {"attention_bias": BOTH, "mlp_bias": BOTH, "pretraining_tp": (1, 2)}
    ),
    "mistral": Family(has_head_dim=True, knobs=ONE_ROPE | {"sliding_window": WINDOWS}),
    "qwen2": Family(knobs=ONE_ROPE | SWITCHED_WINDOW),
    "qwen3": Family(
        has_head_dim=True, least_head_dim=8, knobs=ONE_ROPE | SWITCHED_WINDOW | {"attention_bias": BOTH}
    ),
    "gemma": Family(
        has_head_dim=True, tied=True,
        knobs={"rope_parameters": a_rope, "rms_norm_eps": EPS, "hidden_act": ACTS, "attention_bias": BOTH},
    ),
    "gemma2": Family(
        has_head_dim=True, tied=True, norms=("norm", "pre_feedforward_layernorm"),
        knobs={
            "rope_parameters": a_rope, "query_pre_attn_scalar": fits_heads, "sliding_window": (3, 8, 13),
            "layer_types": mixed_layers, "attn_logit_softcapping": (None, 2.0, 50.0), "attention_bias": BOTH,
            "final_logit_softcapping": (None, 5.0, 30.0), "rms_norm_eps": EPS, "hidden_activation": ACTS,
        },
    ),
    "gemma3_text": Family(
        has_head_dim=True, least_head_dim=8, tied=True, norms=("norm", "q_norm"),
        knobs={
            "rope_parameters": two_ropes, "query_pre_attn_scalar": fits_heads, "sliding_window": (3, 8, 13),
            "layer_types": mixed_layers, "attention_bias": BOTH, "rms_norm_eps": EPS, "hidden_activation": ACTS,
            "final_logit_softcapping": (None, 5.0),
        },
    ),
    "phi": Family(
        attention=("q_proj", "k_proj", "v_proj", "dense"), mlp=("fc1", "fc2"), norms=("final_layernorm",),
        least_head_dim=8,
        knobs={"rope_parameters": partial_rope, "qk_layernorm": BOTH, "layer_norm_eps": EPS, "hidden_act": ACTS},
    ),
    "phi3": Family(
        attention=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj"), least_head_dim=8,
        knobs={"rope_parameters": phi3_rope, "sliding_window": WINDOWS, "rms_norm_eps": EPS, "hidden_act": ACTS},
    ),
    "gpt2": Family(
        attention=("c_attn", "c_proj"), mlp=("c_fc",), ends=("wte", "wpe", "lm_head"), norms=("ln_f",), is_gpt2=True,
        has_kv_heads=False, has_rope=False, tied=True, layers="h", embedding="wte",
        knobs={
            "scale_attn_by_inverse_layer_idx": BOTH, "scale_attn_weights": BOTH, "reorder_and_upcast_attn": BOTH,
            "activation_function": ACTS, "layer_norm_epsilon": EPS, "n_inner": (None, 40),
        },
    ),
    "opt": Family(
        attention=("q_proj", "k_proj", "v_proj", "out_proj"), mlp=("fc1", "fc2"), norms=("final_layer_norm",),
        has_kv_heads=False, has_rope=False, tied=True, gate_mlp=False,
        knobs={
            "word_embed_proj_dim": half_width, "do_layer_norm_before": BOTH, "enable_bias": BOTH,
            "layer_norm_elementwise_affine": BOTH, "activation_function": ACTS, "ffn_dim": (24, 48),
        },
    ),
    "gpt_neox": Family(
        attention=("query_key_value", "dense"), mlp=("dense_h_to_4h", "dense_4h_to_h"), ends=("embed_in", "lm_head"),
        norms=("final_layer_norm",), has_kv_heads=False, least_head_dim=8, embedding="embed_in",
        knobs={
            "rope_parameters": partial_rope, "use_parallel_residual": BOTH, "attention_bias": BOTH,
            "layer_norm_eps": EPS, "hidden_act": ACTS,
        },
    ),
    "mixtral": Family(
        mlp=(), has_head_dim=True,
        knobs=ONE_ROPE | {"num_local_experts": (3, 4), "num_experts_per_tok": (1, 2), "sliding_window": WINDOWS},
    ),
    "granite": Family(knobs=GRANITE | {"mlp_bias": BOTH}),
    "granitemoe": Family(mlp=(), knobs=GRANITE | {"num_local_experts": (3, 4), "num_experts_per_tok": (1, 2)}),
    "olmo": Family(
        norms=(),
        knobs={"rope_parameters": a_rope, "attention_bias": BOTH, "clip_qkv": (None, 0.5), "hidden_act": ACTS},
    ),
    "olmo2": Family(norms=("norm", "q_norm"), knobs=ONE_ROPE | {"attention_bias": BOTH}),
    "olmo3": Family(
        knobs={
            "rope_parameters": two_ropes, "attention_bias": BOTH, "sliding_window": (3, 8, 13),
            "layer_types": mixed_layers,
            "rms_norm_eps": EPS, "hidden_act": ACTS,
        },
    ),
    "olmoe": Family(mlp=(), knobs=ONE_ROPE | EXPERTS | {"attention_bias": BOTH, "clip_qkv": (None, 0.5)}),
    "cohere": Family(
        tied=True,
        knobs={
            "rope_parameters": a_rope, "logit_scale": (0.0625, 1.0), "use_qk_norm": BOTH, "attention_bias": BOTH,
            "layer_norm_eps": EPS, "hidden_act": ACTS,
        },
    ),
    "cohere2": Family(
        has_head_dim=True, tied=True,
        knobs={
            "rope_parameters": a_rope, "logit_scale": (0.0625, 1.0), "attention_bias": BOTH, "layer_norm_eps": EPS,
            "sliding_window": (3, 8, 13), "layer_types": mixed_layers, "hidden_act": ACTS,
        },
    ),
    "starcoder2": Family(
        mlp=("c_fc", "c_proj"), tied=True,
        knobs={
            "rope_parameters": a_rope, "sliding_window": WINDOWS, "use_bias": BOTH, "norm_epsilon": EPS,
            "hidden_act": ACTS,
        },
    ),
    "smollm3": Family(
        tied=True,
        knobs=ONE_ROPE | {
            "no_rope_layers": no_rope_layers, "use_sliding_window": BOTH, "sliding_window": (3, 8),
            "attention_bias": BOTH, "mlp_bias": BOTH,
        },
    ),
    "qwen2_moe": Family(
        mlp=(),
        knobs=ONE_ROPE | EXPERTS | SWITCHED_WINDOW | {
            "moe_intermediate_size": (16, 24), "shared_expert_intermediate_size": (16, 24), "qkv_bias": BOTH,
            "mlp_only_layers": ([], [0]), "decoder_sparse_step": (1, 2),
        },
    ),
    "qwen3_moe": Family(
        mlp=(), has_head_dim=True, least_head_dim=8,
        knobs=ONE_ROPE | {
            "num_experts_per_tok": (1, 2), "norm_topk_prob": BOTH, "num_experts": (3, 4),
            "moe_intermediate_size": (16, 24),
            "attention_bias": BOTH, "mlp_only_layers": ([], [0]), "decoder_sparse_step": (1, 2),
        },
    ),
    "glm": Family(
        mlp=("gate_up_proj", "down_proj"), has_head_dim=True, least_head_dim=8,
        knobs={"rope_parameters": partial_rope, "attention_bias": BOTH, "rms_norm_eps": EPS, "hidden_act": ACTS},
    ),
    "glm4": Family(
        mlp=("gate_up_proj", "down_proj"), has_head_dim=True, least_head_dim=8,
        knobs={"rope_parameters": partial_rope, "attention_bias": BOTH, "rms_norm_eps": EPS, "hidden_act": ACTS},
    ),
    "exaone4": Family(
        has_head_dim=True, least_head_dim=8,
        knobs=ONE_ROPE | {"sliding_window": (3, 8), "layer_types": mixed_layers},
    ),
    "helium": Family(has_head_dim=True, fits=True, knobs=ONE_ROPE | {"attention_bias": BOTH, "mlp_bias": BOTH}),
    "ministral": Family(
        has_head_dim=True, knobs=ONE_ROPE | {"sliding_window": (3, 8), "layer_types": mixed_layers}
    ),
    "arcee": Family(
        mlp=("up_proj", "down_proj"), has_head_dim=True, knobs=ONE_ROPE | {"attention_bias": BOTH, "mlp_bias": BOTH}
    ),
    "seed_oss": Family(
        has_head_dim=True, knobs=ONE_ROPE | {"attention_bias": BOTH, "attention_out_bias": BOTH, "mlp_bias": BOTH}
    ),
    "hunyuan_v1_dense": Family(has_head_dim=True, least_head_dim=8, knobs=ONE_ROPE | {"attention_bias": BOTH}),
    "ernie4_5": Family(has_head_dim=True, tied=True, knobs=ONE_ROPE | {"use_bias": BOTH}),
}  # fmt: skip
# Those of the table in docs/families.md come oftener than the others.
MAIN = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "gpt_neox", "mixtral",
)  # fmt: skip
OTHERS = tuple(name for name in FAMILIES if name not in MAIN)
