"""Fixed scalings by expert name: "math=0.7,code=0.3" -> a mix -> the scalings row of a graph."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, raise_all

LARGE_WEIGHT = 5.0  # larger factors are hardly ever meant
MAX_WEIGHT = 1000.0  # beyond, sums leave the range of a dtype somewhere on their way
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


def require_unmixed(mix: Mapping[str, float], doras: Collection[str], where: str = "mix") -> None:
    """Refuse a mix in which a DoRA expert is not the only one, with weight 1."""
    used = {name: weight for name, weight in mix.items() if weight}
    found = [name for name in used if name in doras]
    if not found or used == {found[0]: 1.0}:
        return
    raise InputError(
        f"{', '.join(found)} cannot be mixed: DoRA divides the changed weight by its norm, which is not linear in the "
        "mix's weights",
        where=where,
        got=",".join(f"{name}={weight:g}" for name, weight in used.items()),
        need=f"{found[0]}=1 and no other expert, or a mix without {' and '.join(found)}",
        code="E_MIX",
    )


def mix_problems(mix: Mapping[str, float], experts: Sequence[str]) -> Iterator[InputError]:
    """All that keeps these weights from being one row of scalings."""
    have = ", ".join(experts) or "none"
    for name in mix:
        if name not in experts:
            yield _problem(f"no expert {name!r}", f"one of: {have}")
    for name, weight in mix.items():
        if not isinstance(weight, int | float) or not abs(weight) <= MAX_WEIGHT:  # NaN is not either
            yield _problem(f"the weight of {name} is {weight!r}", f"a number, at most {MAX_WEIGHT:g} in size")


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
