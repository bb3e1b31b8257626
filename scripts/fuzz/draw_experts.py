"""What is drawn of experts and gates: PEFT's configs, and how their files are stored."""

from __future__ import annotations

from random import Random
from typing import Any

from scripts.fuzz.families import Family

Case = dict[str, Any]
NAMES = ("math", "code", "prose", "law")
REPLACED = ("saved", "rows")  # kinds that replace weights of the base: static builds of that one expert only


def draw_experts(rng: Random, family: Family, base: Case, purpose: str) -> list[Case]:
    """One to four experts of kinds that the purpose allows."""
    count = 1 if purpose == "replaced" and rng.random() < 0.7 else rng.choices((1, 2, 3, 4), (2, 4, 3, 1))[0]
    kinds = {
        "gated": ("lora", "rslora"),
        "hot": ("lora", "rslora"),
        "replaced": ("saved", "rows"),
    }.get(purpose, ("lora", "lora", "rslora", "adalora", "dora"))
    experts = []
    for column in range(count):
        is_plain = purpose == "replaced" and column > 0
        kind = "lora" if is_plain else rng.choice(kinds)
        experts.append(_expert(rng, NAMES[column], kind, family, base, is_gated=purpose == "gated"))
    return experts


def _expert(rng: Random, name: str, kind: str, family: Family, base: Case, *, is_gated: bool) -> Case:
    # PEFT's AdaLoRA knows no embeddings.
    targets = _targets(rng, family, is_gated=is_gated, ends=family.ends[-1:] if kind == "adalora" else family.ends)
    ranks = rng.randint(1, 5)
    config: Case = {
        "target_modules": targets,
        "lora_alpha": rng.choice((1, 4, 8, 16, 3.5)),
        "lora_dropout": rng.choice((0.0, 0.1)),
    }
    if kind == "adalora":
        config |= {"init_r": 4, "target_r": 2, "total_step": 10}
    else:
        config["r"] = ranks
    if kind == "rslora":
        config["use_rslora"] = True
    if kind == "dora":
        config["use_dora"] = True
    if kind != "adalora":
        _patterns(rng, config, family, base)
    if kind == "saved":
        config["modules_to_save"] = rng.sample([*family.ends[-1:], family.embedding, *family.norms], 1)
        config["target_modules"] = _apart(targets, config["modules_to_save"], family)
    if kind == "rows":
        config["trainable_token_indices"] = _rows(rng, family)
        config["target_modules"] = _apart(targets, family.ends, family)
    if family.is_gpt2:
        config["fan_in_fan_out"] = rng.random() < 0.7
    if kind in REPLACED and rng.random() < 0.2:
        config["ensure_weight_tying"] = True
    return {
        "name": name,
        "kind": kind,
        "config": config,
        "seed": rng.randrange(1 << 30),
        "scale": rng.choice((0.3, 0.3, 0.3, 0.05, 0.0) if rng.random() < 0.5 else (0.3,)),
        "dtype": rng.choices(("float32", "bfloat16", "float16"), (6, 2, 1))[0],
        "pruned": kind == "adalora" and rng.random() < 0.6,
    }


def can_come_late(expert: Case, family: Family) -> bool:
    """Beside a LoRA on an end PEFT saves the base's weight, which a running session cannot compare."""
    targets = expert["config"]["target_modules"]
    return isinstance(targets, str) or not set(targets) & set(family.ends)


def draw_late(rng: Random, first: Case) -> Case:
    """An adapter for the modules of `first`, with a rank, a scale and weights of its own."""
    config = {
        "target_modules": first["config"]["target_modules"],
        "lora_alpha": rng.choice((4, 16)),
        "r": rng.randint(1, 5),
    }
    kept = {
        key: value
        for key, value in first["config"].items()
        if key in ("fan_in_fan_out", "layers_to_transform", "layers_pattern")
    }
    dtype = rng.choice(("float32", "bfloat16"))
    config |= kept | ({"use_rslora": True} if rng.random() < 0.5 else {})
    return first | {
        "name": "late",
        "kind": "lora",
        "config": config,
        "seed": rng.randrange(1 << 30),
        "dtype": dtype,
        "scale": 0.3,
    }


def _targets(rng: Random, family: Family, *, is_gated: bool, ends: tuple[str, ...]) -> list[str] | str:
    mlp = family.mlp if family.gate_mlp or not is_gated else ()
    inner = [*family.attention, *mlp]
    style = rng.choices(("list", "regex", "all-linear"), (7, 2, 1))[0]
    if style == "all-linear" and family.mlp and (family.gate_mlp or not is_gated):
        return "all-linear"
    chosen = rng.sample(inner, rng.randint(1, len(inner)))
    if style == "regex":
        return r".*\.(" + "|".join(sorted(chosen)) + ")"
    if rng.random() < 0.3:
        chosen += rng.sample(ends, rng.randint(1, len(ends)))
    return [name for name in chosen if not (is_gated and name == "wpe")]


def _apart(targets: list[str] | str, taken: Any, family: Family) -> list[str] | str:
    """A module is either saved whole or adapted."""
    if isinstance(targets, str):
        return list(family.attention[:2]) if targets == "all-linear" else targets
    return [name for name in targets if name not in taken] or [family.attention[0]]


def _rows(rng: Random, family: Family) -> list[int] | Case:
    rows = sorted(rng.sample(range(64), rng.randint(1, 5)))
    form = rng.choices(("list", "embedding", "both"), (3, 1, 1))[0]
    if form == "list":
        return rows
    return {family.embedding: rows} if form == "embedding" else {family.embedding: rows, "lm_head": rows}


def _patterns(rng: Random, config: Case, family: Family, base: Case) -> None:
    """Ranks and alphas of their own for some modules; some blocks or modules only."""
    names = [*family.attention, *family.mlp]
    if rng.random() < 0.25:
        config["rank_pattern"] = {rng.choice(names): rng.randint(1, 6)}
    if rng.random() < 0.25:
        config["alpha_pattern"] = {rng.choice(names): rng.choice((2, 24, 1.5))}
    blocks = base["config"].get("num_hidden_layers") or base["config"]["n_layer"]
    targets = config["target_modules"]
    if rng.random() < 0.15 and isinstance(targets, list) and not set(targets) & set(family.ends):
        config["layers_to_transform"] = sorted(rng.sample(range(blocks), rng.randint(1, blocks)))
        if rng.random() < 0.5 or family.layers != "layers":
            config["layers_pattern"] = family.layers
    elif rng.random() < 0.1 and blocks > 1:
        config["exclude_modules"] = rf".*{family.layers}\.0\..*"
    if rng.random() < 0.1:
        config["init_lora_weights"] = rng.choice(("gaussian", False))


def draw_gate(rng: Random, experts: list[Case]) -> Case:
    """A gate over these experts; PEFT's fields, and which library saved it."""
    count = len(experts)
    layout = rng.choices(("peft", "damaged", "original"), (4, 3, 3))[0]
    config: Case = {
        "xlora_depth": rng.choices((1, 2, 3), (4, 3, 1))[0],
        "xlora_size": rng.choice((4, 16)),
        "layerwise_scalings": rng.random() < 0.5,
        "softmax_temperature": rng.choice((1.0, 0.5, 2.0)),
        "scaling_pass_value": rng.choices((0.0, 0.3, 1.0), (6, 2, 1))[0],
        "global_scaling_weight": rng.choices((1.0, 1.5, -0.5), (6, 2, 1))[0],
        "xlora_dropout_p": rng.choice((0.0, 0.2)),
    }
    if rng.random() < 0.4:
        config["top_k_lora"] = rng.randint(1, count)
    kind = rng.choices(("softmax", "softmax_topk", "raw"), (6, 2, 1))[0]
    config["enable_softmax"] = kind == "softmax"
    config["enable_softmax_topk"] = kind == "softmax_topk"
    gate: Case = {
        "layout": layout, "config": config, "seed": rng.randrange(1 << 30), "named": rng.random() < 0.3,
    }  # fmt: skip
    if layout == "original":
        gate["as_list"] = rng.random() < 0.5
        gate["use_bias"] = rng.random() < 0.8
        gate["relu"] = rng.random() < 0.8
    return gate
