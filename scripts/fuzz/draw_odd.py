"""Checkpoints that no bundle can hold: each must be refused by name, with a message of the table of known refusals."""

from __future__ import annotations

from random import Random
from typing import Any

from scripts.fuzz.families import FAMILIES, a_rope

Case = dict[str, Any]
ODD = ("bias", "lora_bias", "dora_in_gate", "saved_in_gate", "mixed_dora", "dynamic_saved", "dynamic_rope")


def make_odd(rng: Random, case: Case) -> None:
    """Turn a case into an odd one, where it can be: `odd` says of what kind."""
    fitting = [kind for kind in ODD if _fits(kind, case)]
    kind = case["odd"] = rng.choice(fitting) if fitting else None
    first = case["experts"][0]
    if kind == "bias":
        first["config"]["bias"] = rng.choice(("lora_only", "all"))
    if kind == "lora_bias":
        first["config"]["lora_bias"] = True
    if kind in ("dora_in_gate", "mixed_dora"):
        first["kind"] = "dora"
        first["config"] = {key: value for key, value in first["config"].items() if key != "use_rslora"} | {
            "use_dora": True
        }
    if kind in ("saved_in_gate", "dynamic_saved"):
        norms = FAMILIES[case["base"]["family"]].norms
        first["kind"] = "saved"
        first["config"] |= {"modules_to_save": list(norms[:1])}
    if kind == "mixed_dora":
        case["build"]["named"]["static"] = {first["name"]: 0.5}
        words = case["build"]["arguments"]
        words[words.index("--mix") + 1] = f"{first['name']}=0.5"
    if kind == "dynamic_rope":
        case["base"]["config"]["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def _fits(kind: str, case: Case) -> bool:
    is_plain = case["experts"][0]["kind"] in ("lora", "rslora")
    family = FAMILIES[case["base"]["family"]]
    return {
        "bias": is_plain,
        "lora_bias": is_plain,
        "dora_in_gate": is_plain and case["purpose"] == "gated",
        "saved_in_gate": is_plain and case["purpose"] == "gated" and bool(family.norms),
        "mixed_dora": is_plain and case["purpose"] == "static" and case["build"]["merge"] == "linear",
        "dynamic_saved": is_plain and case["purpose"] == "dynamic" and bool(family.norms),
        "dynamic_rope": family.knobs.get("rope_parameters") is a_rope,  # one rope for all blocks, of whole heads
    }[kind]
