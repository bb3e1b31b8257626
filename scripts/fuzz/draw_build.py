"""What is drawn of a build's options and of the requests that its bundle must answer."""

from __future__ import annotations

from random import Random
from typing import Any

Case = dict[str, Any]
MIX_WEIGHTS = (0.7, 0.3, 1.0, 0.5, -0.4, 1.5, 0.0)
MERGES = ("linear", "cat", "svd", "ties", "magnitude_prune", "dare_linear", "rank-select")
UNMIXED = ("dora", "saved", "rows")


def draw_build(rng: Random, case: Case) -> Case:
    """`arguments` after base, adapters and --out; `named`: mixes by the variant's name; what is told of the base."""
    purpose, experts = case["purpose"], case["experts"]
    modes = {"static": ["static"], "replaced": ["static"], "both": ["dynamic", "static"]}.get(purpose, ["dynamic"])
    named: dict[str, Case] = {}
    merge = "linear"
    is_foldable = purpose == "gated" and rng.random() < 0.12
    if is_foldable:  # the plain graph, which folded decoding needs
        modes, named["static"] = ["dynamic", "static"], {}
    arguments = ["--mode", *modes, *(["--mix", "base"] if is_foldable else [])]
    if "static" in modes and not is_foldable:
        mix = _mix(rng, experts, is_replaced=purpose == "replaced")
        named["static"] = mix
        arguments += ["--mix", mix_word(mix)]
        merge = _merge(rng, arguments, experts, mix)
    words = []
    if "dynamic" in modes and purpose != "hot" and rng.random() < 0.3 and _mixable(experts):
        named["warm"] = _mix(rng, experts)
        words.append(f"warm:{mix_word(named['warm'])}")
    if purpose != "hot" and merge == "linear" and rng.random() < 0.05 and _mixable(experts):
        named["cool"] = _mix(rng, experts)
        words.append(f"cool:static:{mix_word(named['cool'])}")
    arguments += ["--variants", *words] if words else []
    arguments += ["--verify", rng.choices(("quick", "structure", "full"), (60, 38, 2))[0], "--threads", "1"]
    arguments += _forms(rng, modes, purpose)
    if purpose == "hot":
        arguments += ["--adapters-as", "inputs", "--max-total-rank", str(rng.choice((32, 48)))]
        if case["late"] or rng.random() < 0.5:
            arguments += ["--max-experts", str(len(experts) + 1)]
    gate = case["gate"]
    if gate and gate["config"]["enable_softmax_topk"] and (gate["layout"] == "original" or rng.random() < 0.3):
        arguments += ["--topk-softmax", "token"]
    return {"arguments": arguments, "named": named, "merge": merge, "names_base": rng.random() < 0.7}


def mix_word(mix: Case) -> str:
    """As --mix takes it."""
    return ",".join(f"{name}={weight}" for name, weight in mix.items()) or "base"


def _mixable(experts: list[Case]) -> list[Case]:
    return [expert for expert in experts if expert["kind"] not in UNMIXED]


def _mix(rng: Random, experts: list[Case], *, is_replaced: bool = False) -> Case:
    alone = [expert for expert in experts if expert["kind"] in UNMIXED]
    if is_replaced or (alone and rng.random() < 0.4) or not _mixable(experts):
        return {rng.choice(alone or experts)["name"]: 1.0}
    chosen = _mixable(experts)
    chosen = rng.sample(chosen, rng.randint(1, len(chosen)))
    return {expert["name"]: rng.choice(MIX_WEIGHTS) for expert in chosen}


def _merge(rng: Random, arguments: list[str], experts: list[Case], mix: Case) -> str:
    """Another merge than the sum, held to the PEFT adapter that the build saves of it."""
    kinds = {expert["kind"] for expert in experts if expert["name"] in mix}
    if rng.random() < 0.75 or kinds & set(UNMIXED):
        return "linear"
    method = rng.choice(MERGES)
    arguments += ["--merge", method, "--save-adapter", "saved"]
    if method in ("ties", "magnitude_prune", "dare_linear"):
        arguments += ["--density", rng.choice(("0.5", "0.8"))]
    if method == "dare_linear":
        arguments += ["--seed", "3"]
    if method == "svd":
        arguments += ["--merge-rank", rng.choice(("2", "24"))]
    return method


def _forms(rng: Random, modes: list[str], purpose: str) -> list[str]:
    words = []
    emit = rng.choices(("portable", "modern"), (7, 3))[0]
    words += ["--emit", emit] if emit == "modern" else []
    if emit == "portable" and purpose != "hot" and rng.random() < 0.12:
        words += ["--cache", "none"]
    dtype = rng.choices(("float32", "float16", "bfloat16"), (38, 1, 1))[0]
    words += ["--dtype", dtype] if dtype != "float32" else []
    if rng.random() < 0.15:
        words.append("--no-onnxruntime-form")
    if "dynamic" in modes and rng.random() < 0.12:
        words += ["--scalings", "sites"]
    if rng.random() < 0.06:
        words += ["--site-op", "plugin"]
    if purpose == "gated" and rng.random() < 0.06:
        words += ["--gate-op", "plugin"]
    return words


def draw_runs(rng: Random, case: Case) -> list[Case]:
    """Two or three batches: rows with prompts and variants of their own, and a way to decode."""
    is_gated = case["gate"] is not None
    runs = []
    for number in range(rng.choice((2, 3))):
        new = rng.choice((1, 6, 12))
        decode = rng.choice(("exact", "paired", "auto", "lookup", "lookup:3", "paired:2", "frozen:2", "folded:1"))
        rows = [_row(rng, case, new, is_last=number == 0) for _ in range(rng.choice((1, 2, 3, 5)))]
        runs.append(
            {
                "rows": rows,
                "new": new,
                "decode": decode if is_gated and number else "exact",
                "batch": rng.choice((1, 2, 8)),
            }
        )
    return runs


def _row(rng: Random, case: Case, new: int, *, is_last: bool) -> Case:
    config = case["base"]["config"]
    positions = config.get("max_position_embeddings") or config["n_positions"]
    longest = positions + 1 - new
    length = rng.choice((1, 2, rng.randint(1, 20), rng.randint(1, longest)))
    if is_last and rng.random() < 0.25:
        length = longest
    vocab = config["vocab_size"]
    ids = rng.choices(range(vocab), k=length)
    if rng.random() < 0.3:  # texts that repeat themselves, which drafts are taken from
        ids = (ids[:3] * length)[:length]
    return {"prompt": ids, **_way(rng, case)}


def _way(rng: Random, case: Case) -> Case:
    """A variant by name, or a mix of its own."""
    named, experts = case["build"]["named"], case["experts"]
    if case["purpose"] in ("static", "replaced"):
        return {"variant": rng.choice(sorted(named))}
    ways: list[Case] = [{"variant": "base"}, *({"variant": expert["name"]} for expert in experts)]
    ways += [{"variant": name} for name in [*sorted(named), *(late["name"] for late in case["late"])]]
    if case["gate"]:
        ways += [{"variant": "xlora"}] * (len(ways) + 1)
    if _mixable(experts):
        ways.append({"mix": _mix(rng, _mixable(experts))})
    return dict(rng.choice(ways))
