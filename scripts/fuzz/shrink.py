"""A smaller case that still shows the same finding: one thing less at a time, as long as it does."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

from scripts.fuzz.draw_build import mix_word

Case = dict[str, Any]
OPTIONS = {  # a build's options that can be left out -> how many words follow
    "--emit": 1, "--cache": 1, "--dtype": 1, "--scalings": 1, "--site-op": 1, "--gate-op": 1, "--max-experts": 1,
    "--no-onnxruntime-form": 0,
}  # fmt: skip
# Too large by default, or beyond the vocabulary.
NEEDED = {"num_hidden_layers", "n_layer", "hidden_size", "n_embd", "vocab_size", "num_attention_heads", "n_head",
          "max_position_embeddings", "n_positions", "intermediate_size", "num_key_value_heads", "head_dim", "ffn_dim",
          "word_embed_proj_dim", "original_max_position_embeddings", "query_pre_attn_scalar", "num_experts",
          "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
          "sliding_window", "pad_token_id", "bos_token_id", "eos_token_id"}  # fmt: skip


def shrink(case: Case, shows: Callable[[Case], bool], seconds: float = 180.0, tries: int = 80) -> tuple[Case, int]:
    """Take away what the finding does not need until nothing more goes or the time is up; and how many were tried."""
    end, tried = time.monotonic() + seconds, 0
    progress = True
    while progress:
        progress = False
        for smaller in smaller_cases(case):
            if time.monotonic() > end or tried >= tries:
                return case, tried
            tried += 1
            if shows(smaller):
                case, progress = smaller, True
                break
    return case, tried


def smaller_cases(case: Case) -> Iterator[Case]:
    """Cases with one thing less each, the largest pieces first."""
    yield from _without_requests(case)
    yield from _without_experts(case)
    if case["gate"] is not None:
        yield from _simpler_gates(case)
    yield from _fewer_words(case)
    yield from _simpler_bases(case)
    yield from _simpler_experts(case)
    yield from _shorter_prompts(case)


def _changed(case: Case, **parts: Any) -> Case:
    return copy.deepcopy(case) | copy.deepcopy(parts)


def _without_requests(case: Case) -> Iterator[Case]:
    if case["texts"]:
        yield _changed(case, texts=[])
    if len(case["texts"]) > 1:
        for text in case["texts"]:
            yield _changed(case, texts=[text])
    for run in case["runs"] if len(case["runs"]) > 1 else []:
        yield _changed(case, runs=[run])
    for number, run in enumerate(case["runs"]):
        for row in run["rows"] if len(run["rows"]) > 1 else []:
            yield _changed(case, runs=[*case["runs"][:number], run | {"rows": [row]}, *case["runs"][number + 1 :]])


def _without_experts(case: Case) -> Iterator[Case]:
    for expert in case["experts"] if len(case["experts"]) > 1 else []:
        smaller = without_expert(case, expert["name"])
        if smaller is not None:
            yield smaller


def without_expert(case: Case, name: str) -> Case | None:
    """The case without an expert and all that names it; None where nothing would be asked any more."""
    smaller = copy.deepcopy(case)
    smaller["experts"] = [expert for expert in smaller["experts"] if expert["name"] != name]
    build = smaller["build"]
    for mix in build["named"].values():
        if mix.pop(name, None) is not None and not mix:
            return None
    build["arguments"] = _renamed_mixes(build)
    for run in smaller["runs"]:
        run["rows"] = [row for row in run["rows"] if row.get("variant") != name]
        for row in run["rows"]:
            (row.get("mix") or {}).pop(name, None)
    smaller["runs"] = [run for run in smaller["runs"] if run["rows"]]
    gate = smaller["gate"]
    if gate and (gate["config"].get("top_k_lora") or 0) > len(smaller["experts"]):
        gate["config"]["top_k_lora"] = len(smaller["experts"])
    return smaller if smaller["runs"] else None


def _renamed_mixes(build: Case) -> list[str]:
    """The arguments with each mix as `named` has it now."""
    words, mixes = list(build["arguments"]), build["named"]
    for place, word in enumerate(words):
        if place and words[place - 1] == "--mix":
            words[place] = mix_word(mixes["static"])
        elif word.partition(":")[0] in mixes and ":" in word:
            name = word.partition(":")[0]
            words[place] = f"{name}:{'static:' if ':static:' in word else ''}{mix_word(mixes[name])}"
    return words


def _simpler_gates(case: Case) -> Iterator[Case]:
    gate = case["gate"]
    if gate["layout"] != "peft":
        yield _changed(case, gate={key: gate[key] for key in ("config", "seed", "named")} | {"layout": "peft"})
    if gate["named"]:
        yield _changed(case, gate=gate | {"named": False})
    plain = {"xlora_depth": 1, "layerwise_scalings": False, "softmax_temperature": 1.0, "scaling_pass_value": 0.0,
             "global_scaling_weight": 1.0, "top_k_lora": None, "xlora_dropout_p": 0.0}  # fmt: skip
    for field, value in plain.items():
        if gate["config"].get(field, value) != value:
            yield _changed(case, gate=gate | {"config": gate["config"] | {field: value}})
    if not gate["config"]["enable_softmax"]:
        yield _changed(
            case, gate=gate | {"config": gate["config"] | {"enable_softmax": True, "enable_softmax_topk": False}}
        )


def _fewer_words(case: Case) -> Iterator[Case]:
    build = case["build"]
    words = build["arguments"]
    for option, count in OPTIONS.items():
        if option in words:
            place = words.index(option)
            yield _changed(case, build=build | {"arguments": words[:place] + words[place + 1 + count :]})
    if "--variants" in words:
        place = words.index("--variants")
        end = next((n for n in range(place + 1, len(words)) if words[n].startswith("--")), len(words))
        gone = {word.partition(":")[0] for word in words[place + 1 : end]}
        runs = [run | {"rows": [row for row in run["rows"] if row.get("variant") not in gone]} for run in case["runs"]]
        if all(run["rows"] for run in runs):
            named = {name: mix for name, mix in build["named"].items() if name not in gone}
            yield _changed(case, build=build | {"arguments": words[:place] + words[end:], "named": named}, runs=runs)
    if not build["names_base"]:
        yield _changed(case, build=build | {"names_base": True})
    if case["via"] != "cli":
        yield _changed(case, via="cli")


def _simpler_bases(case: Case) -> Iterator[Case]:
    base = case["base"]
    plain = {"tokenizer": None, "shards": 1, "dtype": "float32", "form": "full", "flag_lies": None, "generation": {}}
    for field, value in plain.items():
        if base[field] != value and not (field == "tokenizer" and case["texts"]):
            yield _changed(case, base=base | {field: value})
    blocks = "n_layer" if "n_layer" in base["config"] else "num_hidden_layers"
    count = base["config"][blocks]
    if count > 1 and not any("layers_to_transform" in expert["config"] for expert in case["experts"]):
        config = base["config"] | {blocks: 1}
        for field in ("layer_types", "no_rope_layers"):
            if field in config:
                config[field] = config[field][:1]
        yield _changed(case, base=base | {"config": config})
    for field in [field for field in base["config"] if field not in NEEDED]:
        yield _changed(
            case, base=base | {"config": {key: value for key, value in base["config"].items() if key != field}}
        )


def _simpler_experts(case: Case) -> Iterator[Case]:
    for number, expert in enumerate(case["experts"]):

        def put(changed: Case, number: int = number) -> Case:
            return _changed(case, experts=[*case["experts"][:number], changed, *case["experts"][number + 1 :]])

        config = expert["config"]
        for field, value in {"dtype": "float32", "scale": 0.3, "pruned": False}.items():
            if expert[field] != value:
                yield put(expert | {field: value})
        for field in [
            field
            for field in config
            if field not in ("target_modules", "r", "lora_alpha", "init_r", "target_r", "total_step")
        ]:
            yield put(expert | {"config": {key: value for key, value in config.items() if key != field}})
        targets = config["target_modules"]
        for target in targets if isinstance(targets, list) and len(targets) > 1 else []:
            yield put(expert | {"config": config | {"target_modules": [name for name in targets if name != target]}})


def _shorter_prompts(case: Case) -> Iterator[Case]:
    for number, run in enumerate(case["runs"]):
        for place, row in enumerate(run["rows"]):
            length = len(row["prompt"])
            for shorter in sorted({1, length // 2, length - 1}):
                if 0 < shorter < length:
                    rows = [*run["rows"][:place], row | {"prompt": row["prompt"][:shorter]}, *run["rows"][place + 1 :]]
                    yield _changed(
                        case, runs=[*case["runs"][:number], run | {"rows": rows}, *case["runs"][number + 1 :]]
                    )
        if run["new"] > 1:
            yield _changed(
                case, runs=[*case["runs"][:number], run | {"new": run["new"] // 2}, *case["runs"][number + 1 :]]
            )
