"""Case number N of a seed: a whole checkpoint, a build of it and what is asked of the bundle, as plain JSON values."""

from __future__ import annotations

from random import Random
from typing import Any

from scripts.fuzz.draw_build import draw_build, draw_runs
from scripts.fuzz.draw_experts import can_come_late, draw_experts, draw_gate, draw_late
from scripts.fuzz.draw_odd import make_odd
from scripts.fuzz.families import FAMILIES, MAIN, OTHERS, Family

Case = dict[str, Any]
FORMAT = 1
CASES_A_HASH_SEED = 32  # cases that share a process, and so a PYTHONHASHSEED
# Fields of generation_config.json that change greedy tokens in transformers' `generate`.
GENERATION: tuple[Case, ...] = (
    {"repetition_penalty": 1.3},
    {"suppress_tokens": [3, 4, 9, 20]},
    {"begin_suppress_tokens": [5, 6]},
    {"no_repeat_ngram_size": 2},
    {"eos_token_id": [2, 7, 11]},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9},  # greedy decoding leaves these out
    {"min_new_tokens": 3},
)
PURPOSES = ("gated", "dynamic", "static", "both", "replaced", "hot")
WEIGHTS = (30, 22, 18, 6, 16, 8)


def draw_case(seed: int, number: int) -> Case:
    """Everything of the case follows from (seed, number), in any process."""
    rng = Random(f"{seed}/{number}")
    name = rng.choice(MAIN) if rng.random() < 0.6 else rng.choice(OTHERS)
    family = FAMILIES[name]
    purpose = rng.choices(PURPOSES, WEIGHTS)[0]
    base = draw_base(rng, name, family)
    experts = draw_experts(rng, family, base, purpose)
    gate = draw_gate(rng, experts) if purpose == "gated" else None
    late = [draw_late(rng, experts[0])] if purpose == "hot" and can_come_late(experts[0], family) else []
    case: Case = {
        "format": FORMAT, "seed": seed, "number": number, "purpose": purpose, "base": base, "experts": experts,
        "gate": gate,
        "late": late,  # loaded into the running session
    }  # fmt: skip
    case["build"] = draw_build(rng, case)
    case["runs"] = draw_runs(rng, case)
    case["odd"] = None
    if rng.random() < 0.07:
        make_odd(rng, case)
    case["texts"] = draw_texts(rng) if base["tokenizer"] else []
    case["hash_seed"] = hash_seed_of(seed, number)
    case["built_twice"] = rng.random() < 0.04
    case["via"] = rng.choice(("cli", "python", "python"))
    return case


def hash_seed_of(seed: int, number: int) -> int:
    """PYTHONHASHSEED of a case; neighbours share it, as they share a process."""
    return Random(f"hash/{seed}/{number // CASES_A_HASH_SEED}").randrange(1, 1 << 32)


def draw_base(rng: Random, name: str, family: Family) -> Case:
    """A config of the family and how its folder is written."""
    config = _sizes(rng, family)
    for knob in sorted(family.knobs):
        values = family.knobs[knob]
        if rng.random() < 0.35:
            continue  # the config's own default
        drawn = values(rng, config) if callable(values) else rng.choice(values)
        config[knob] = drawn
    _settle(name, config)
    is_tied = rng.random() < (0.6 if family.tied else 0.3)
    if is_tied != family.tied or rng.random() < 0.5:
        config["tie_word_embeddings"] = is_tied
    tokenizer = rng.choices((None, "plain", "added", "config_only", "old_files"), (12, 3, 2, 1, 1))[0]
    if tokenizer:
        config["vocab_size"] = 320  # room for all bytes
    lies = "tied" if not is_tied and rng.random() < 0.25 else None
    _tokens(rng, config)
    return {
        "family": name,
        "config": config,
        "seed": rng.randrange(1 << 30),
        "dtype": rng.choices(("float32", "bfloat16", "float16"), (6, 3, 1))[0],
        "shards": rng.choices((1, 2, 3), (7, 2, 1))[0],
        "flag_lies": lies,  # config.json is made to say so though the files hold two weights
        "form": rng.choices(("full", "minimal", "old_rope"), (6, 3, 2))[0],
        "tokenizer": tokenizer,
        "generation": rng.choice(GENERATION) if rng.random() < 0.06 else {},  # beside what the config says
    }


def _sizes(rng: Random, family: Family) -> Case:
    heads = rng.choice((1, 2, 4))
    head_dim = rng.choice([width for width in (4, 8, 12, 16) if width >= family.least_head_dim])
    hidden = rng.choice((16, 24, 32, 48)) if family.has_head_dim and not family.fits else heads * head_dim
    blocks = rng.choices((1, 2, 3, 4), (8, 8, 2, 1))[0]
    vocab, positions = rng.choice((64, 97, 320)), rng.choice((40, 64, 128))
    if family.is_gpt2:
        return {
            "n_embd": hidden, "n_layer": blocks, "n_head": heads, "n_positions": positions, "vocab_size": vocab,
            "num_hidden_layers": blocks, "hidden_size": hidden,
        }  # fmt: skip
    sizes = {
        "hidden_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads, "vocab_size": vocab,
        "max_position_embeddings": positions, "intermediate_size": rng.choice((16, 24, 40)),
    }  # fmt: skip
    if family.has_kv_heads:
        sizes["num_key_value_heads"] = rng.choice([kv for kv in (1, 2, 4) if heads % kv == 0])
    if family.has_head_dim:
        sizes["head_dim"] = head_dim
    return sizes


def _settle(name: str, config: Case) -> None:
    """Fields that must agree with others, or that the config's class would make too large."""
    if name == "gpt2":
        config.pop("num_hidden_layers"), config.pop("hidden_size")
    if name == "phi3":
        config["original_max_position_embeddings"] = config["max_position_embeddings"]
    if name == "opt":
        config.pop("intermediate_size")
        config.setdefault("ffn_dim", 32)
        config.setdefault("word_embed_proj_dim", config["hidden_size"])
    defaults: dict[str, Case] = {
        "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 8},
        "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 8},
        "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                      "shared_expert_intermediate_size": 16},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }  # fmt: skip
    for field, value in defaults.get(name, {}).items():
        config.setdefault(field, value)


def _tokens(rng: Random, config: Case) -> None:
    config["bos_token_id"] = rng.choice((1, None))
    config["eos_token_id"] = rng.choice((2, None, [2, 5]))
    config["pad_token_id"] = rng.choice((0, None, 3))


PIECES = (
    "<|im_start|>",
    "<|im_end|>",
    " ",
    "  ",
    "\n",
    "ab",
    "é",
    "Привет",
    "日本",
    "😀",
    "<s>",
    "<x",
    "x9>",
    "\t",
    "1+1=2",
    "'s",
)


def draw_texts(rng: Random) -> list[str]:
    """Short texts of scripts, spaces and the names of tokens."""
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 5))) for _ in range(6)]
