"""How tokens under a gate are decoded, by name: "exact", "paired", "lookup:8", "frozen:4". See docs/decoding.md."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from runtime.errors import InputError


class DecodeMode(StrEnum):
    """The rungs of the ladder from two passes a token to one."""

    EXACT = "exact"  # scaling pass, then main pass
    PAIRED = "paired"  # the main pass runs beside the scaling pass of a drafted next token
    LOOKUP = "lookup"  # several tokens a pass, drafted from the request's own text
    FROZEN = "frozen"  # approximate: from some token on the scalings stay
    FOLDED = "folded"  # the same, in the weights of a session without experts
    AUTO = "auto"  # exact or paired, whichever is faster here


class Freeze(StrEnum):
    """Which scalings stay."""

    LAST = "last"  # those of the last token that the scaling pass saw
    MEAN = "mean"  # the mean over all tokens that it saw, the prompt's included


FREEZING = (DecodeMode.FROZEN, DecodeMode.FOLDED)
DRAFTS = {DecodeMode.PAIRED: 1, DecodeMode.LOOKUP: 8}  # how many at a time, where nobody says
MOST_DRAFTS = 64


@dataclass(frozen=True, slots=True)
class Decode:
    """A mode and its settings; rows that cannot use it (no gate, no K/V cache) are decoded as in `exact`."""

    mode: DecodeMode = DecodeMode.AUTO
    after: int = 0  # frozen and folded: how many generated tokens still get scalings of their own
    freeze: Freeze = Freeze.LAST
    drafts: int = 1  # paired and lookup: the most tokens that are drafted at a time

    @property
    def freezes(self) -> bool:
        """Whether scalings stay from some token on."""
        return self.mode in FREEZING


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far tokens chosen under frozen scalings are from exact decoding of the same text."""

    tokens: int  # compared: those chosen under frozen scalings
    kl_mean: float  # KL(exact || frozen) in nats, mean over the tokens
    same_top: float  # share of the tokens with the same likeliest token


@dataclass(slots=True)
class StepCount:
    """Steps of a batch so far, and those that `exact` would have taken."""

    taken: int = 0
    exact: int = 0

    def copy(self) -> StepCount:
        """As it is now."""
        return StepCount(self.taken, self.exact)

    def since(self, before: StepCount) -> StepCount:
        """What has come on top of `before`."""
        return StepCount(self.taken - before.taken, self.exact - before.exact)


@dataclass(frozen=True, slots=True)
class FoldCosts:
    """What folding a mix into a session's weights took, and what a step takes before and after."""

    seconds: float  # to fold and to open
    frozen_step: float | None  # seconds, median; None: too few steps to tell
    folded_step: float | None

    @property
    def break_even(self) -> float | None:
        """How many tokens pay for the folding; infinite where its steps are no faster, None where nobody knows."""
        if self.frozen_step is None or self.folded_step is None:
            return None
        saved = self.frozen_step - self.folded_step
        return self.seconds / saved if saved > 0 else float("inf")


def decode_from_text(text: str, freeze: str | None = None) -> Decode:
    """Read exact, paired[:K], lookup[:K], auto, frozen[:K] or folded[:K], and with the last two what stays."""
    name, colon, count = text.partition(":")
    is_count = count.isascii() and count.isdigit() and len(count) < 10
    if name not in tuple(DecodeMode) or (colon and not (is_count and name in (*FREEZING, *DRAFTS))):
        need = "exact, paired[:K], lookup[:K], frozen[:K], folded[:K] or auto"
        raise _problem("no such way to decode", text, need)
    mode = DecodeMode(name)
    if freeze is not None and mode not in FREEZING:
        raise _problem(
            "only frozen scalings are frozen", f"freeze {freeze} with decode {text}", "decode frozen or folded"
        )
    if freeze is not None and freeze not in tuple(Freeze):
        raise _problem("no such way to freeze", freeze, "last or mean")
    if mode not in DRAFTS:
        return Decode(mode, int(count or 0), Freeze(freeze or Freeze.LAST))
    drafts = int(count or DRAFTS[mode])
    if not 1 <= drafts <= MOST_DRAFTS:
        raise _problem("that many drafts at a time cannot be", text, f"{mode}:K with K from 1 to {MOST_DRAFTS}")
    return Decode(mode, drafts=drafts)


def _problem(what: str, got: str, need: str) -> InputError:
    return InputError(what, got=repr(got)[:80], need=need, code="E_DECODE")
