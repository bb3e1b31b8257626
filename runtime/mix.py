"""Fixed scalings by expert name: "math=0.7,code=0.3" -> a mix -> the scalings row of a graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, raise_all

LARGE_WEIGHT = 5.0  # larger factors are hardly ever meant
BASE = "base"  # the mix with no expert in it


def mix_from_text(text: str) -> dict[str, float]:
    """Read "NAME=WEIGHT,NAME=WEIGHT"; "base" alone means no expert at all."""
    if text.strip() == BASE:
        return {}
    mix: dict[str, float] = {}
    problems = []
    for part in text.split(","):
        name, equals, weight = (word.strip() for word in part.partition("="))
        value = _number(weight)
        if not (name and equals) or value is None:
            problems.append(_problem(f"cannot read {part.strip()!r}", "NAME=WEIGHT with a finite number"))
        elif name in mix:
            problems.append(_problem(f"{name} is given twice", "each expert once"))
        else:
            mix[name] = value
    raise_all("--mix", problems)
    return mix


def scalings_from_mix(mix: Mapping[str, float], experts: Sequence[str]) -> NDArray[np.float32]:
    """[E]: the mix's weights in the order of `experts` (gate columns); experts it does not name get 0."""
    raise_all("mix", list(mix_problems(mix, experts)))
    return np.array([mix.get(name, 0.0) for name in experts], np.float32)


def mix_problems(mix: Mapping[str, float], experts: Sequence[str]) -> Iterator[InputError]:
    """All that keeps these weights from being one row of scalings."""
    have = ", ".join(experts) or "none"
    for name in mix:
        if name not in experts:
            yield _problem(f"no expert {name!r}", f"one of: {have}")
    for name, weight in mix.items():
        if not abs(weight) <= float(np.finfo(np.float32).max):  # NaN is not either
            yield _problem(f"the weight of {name} is {weight}", "a finite number")


def mix_note(mix: Mapping[str, float]) -> str | None:
    """What to say of a mix that looks like percentages."""
    large = [f"{name}={weight:g}" for name, weight in mix.items() if abs(weight) > LARGE_WEIGHT]
    return f"weights are factors, 0.7 is 70 %: the mix has {', '.join(large)}" if large else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _problem(what: str, need: str) -> InputError:
    return InputError(what, need=need, code="E_MIX")
