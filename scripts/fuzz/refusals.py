"""Refusals that are known and meant, though PEFT runs the model: what each message means in plain words."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownRefusal:
    """A message, and why such a build is refused."""

    pattern: str
    reason: str


KNOWN = (
    KnownRefusal(r"softcap\), which TensorRT's Attention operator refuses", "softcap with --emit modern"),
    KnownRefusal(r"the modern emit always has a K/V cache", "--emit modern without a cache"),
    KnownRefusal(r"embed_positions is a|wpe", "a LoRA on learned positions that take more than ids"),
    KnownRefusal(r"float16", "values beyond float16"),
    KnownRefusal(r"\bbias = .* cannot be exported: trained biases", "trained biases beside a LoRA"),
    KnownRefusal(r"lora_bias = True cannot be exported", "a bias on lora_B, which PEFT's gate does not gate"),
    KnownRefusal(r"DoRA divides the changed weight by its norm", "DoRA is not linear, so it cannot be weighed"),
    KnownRefusal(
        r"DoRA rescales whole weights|it replaces weights of the base", "a merge of more than low-rank updates"
    ),
    KnownRefusal(r"replaces .* of the base, which scalings cannot switch", "replaced weights in a dynamic graph"),
    KnownRefusal(r"a gate cannot mix an expert that replaces weights", "replaced weights in a gate"),
    KnownRefusal(r"cannot be mixed: it replaces", "replaced weights in a mix"),
    KnownRefusal(r"the mix changes no module: there is no adapter", "nothing to save of a mix that changes nothing"),
    KnownRefusal(r"changes with the sequence length", "a rope that changes with the sequence length"),
)


def known_reason(message: str) -> str | None:
    """Why this refusal is meant; None: nobody knows this message."""
    return next((known.reason for known in KNOWN if re.search(known.pattern, message)), None)
