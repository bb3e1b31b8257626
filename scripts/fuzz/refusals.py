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
    KnownRefusal(r"has a LoRA on .*wpe|embed_positions is a", "a LoRA on learned positions that take more than ids"),
    KnownRefusal(r"reached beyond float16|float16.*range|too large for float16", "values beyond float16"),
    KnownRefusal(
        r"is above the largest total rank|--max-total-rank|max_total_rank", "more ranks than the session may load"
    ),
)


def known_reason(message: str) -> str | None:
    """Why this refusal is meant; None: nobody knows this message."""
    return next((known.reason for known in KNOWN if re.search(known.pattern, message)), None)
