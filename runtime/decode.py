"""How tokens under a gate are decoded, by name: "exact", "paired", "frozen:4", "auto". See docs/decoding.md."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from runtime.errors import InputError


class DecodeMode(StrEnum):
    """The rungs of the ladder from two passes a token to one."""

    EXACT = "exact"  # scaling pass, then main pass
    PAIRED = "paired"  # the main pass runs beside the scaling pass of a drafted next token
    FROZEN = "frozen"  # approximate: from some token on the scalings stay
    AUTO = "auto"  # exact or paired, whichever is faster here


class Freeze(StrEnum):
    """Which scalings stay."""

    LAST = "last"  # those of the last token that the scaling pass saw
    MEAN = "mean"  # the mean over all tokens that it saw, the prompt's included


@dataclass(frozen=True, slots=True)
class Decode:
    """A mode and its settings; rows that cannot use it (no gate, no K/V cache) are decoded as in `exact`."""

    mode: DecodeMode = DecodeMode.AUTO
    after: int = 0  # frozen: how many generated tokens still get scalings of their own
    freeze: Freeze = Freeze.LAST


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far tokens chosen under frozen scalings are from exact decoding of the same text."""

    tokens: int  # compared: those chosen under frozen scalings
    kl_mean: float  # KL(exact || frozen) in nats, mean over the tokens
    same_top: float  # share of the tokens with the same likeliest token


def decode_from_text(text: str, freeze: str | None = None) -> Decode:
    """Read exact, paired, auto or frozen[:K], and with frozen what stays: last (default) or mean."""
    name, colon, count = text.partition(":")
    is_frozen = name == DecodeMode.FROZEN
    is_count = count.isascii() and count.isdigit() and len(count) < 10
    if name not in tuple(DecodeMode) or (colon and not (is_frozen and is_count)):
        raise _problem("no such way to decode", text, "exact, paired, frozen, frozen:K or auto")
    if freeze is not None and not is_frozen:
        raise _problem("only frozen scalings are frozen", f"freeze {freeze} with decode {text}", "decode frozen")
    if freeze is not None and freeze not in tuple(Freeze):
        raise _problem("no such way to freeze", freeze, "last or mean")
    return Decode(DecodeMode(name), int(count or 0), Freeze(freeze or Freeze.LAST))


def _problem(what: str, got: str, need: str) -> InputError:
    return InputError(what, got=repr(got)[:80], need=need, code="E_DECODE")
