"""Mixes: what can be read, what is refused, which column gets what."""

from __future__ import annotations

import pytest

from runtime.errors import InputError
from runtime.mix import mix_from_text, mix_note, scalings_from_mix

EXPERTS = ["math", "code", "law"]


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("math=0.7,code=0.3", {"math": 0.7, "code": 0.3}),
        (" math = 1 ", {"math": 1.0}),
        ("law=-2e-1", {"law": -0.2}),
        ("base", {}),
        ("base=1", {"base": 1.0}),
    ],
)
def test_mixes_read(text: str, mix: dict[str, float]) -> None:
    assert mix_from_text(text) == mix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("math", "cannot read 'math'; need NAME=WEIGHT with a finite number"),
        ("math=", "cannot read 'math='"),
        ("=1", "cannot read '=1'"),
        ("math=x", "cannot read 'math=x'"),
        ("math=nan", "cannot read 'math=nan'"),
        ("math=inf", "cannot read 'math=inf'"),
        ("", "cannot read ''"),
        ("math=1,", "cannot read ''"),
        ("math=1,math=1", "math is given twice; need each expert once"),
        ("a,b=1,b=2", r"2 problems\n  - cannot read 'a'.*\n  - b is given twice"),
    ],
)
def test_mixes_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mix_from_text(text)


def test_a_mix_fills_the_columns_of_its_experts() -> None:
    assert scalings_from_mix({"law": 0.25, "math": -2}, EXPERTS).tolist() == [-2, 0, 0.25]
    assert scalings_from_mix({}, EXPERTS).tolist() == [0, 0, 0]


def test_unknown_experts_are_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="no expert 'Math'; need one of: math, code, law"):
        scalings_from_mix({"Math": 1.0}, EXPERTS)
    with pytest.raises(InputError, match="no expert 'x'; need one of: none"):
        scalings_from_mix({"x": 1.0}, [])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39, -1000.5, "1", None])
def test_weights_that_are_no_sound_factors_are_refused(weight: float) -> None:
    with pytest.raises(InputError, match=r"the weight of code is .*; need a number, at most 1000 in size"):
        scalings_from_mix({"code": weight}, EXPERTS)


def test_a_mix_of_percentages_is_remarked_on() -> None:
    assert mix_note({"add": 70.0, "sort": 0.3}) == "weights are factors, 0.7 is 70 %: the mix has add=70"
    assert mix_note({"add": 0.7, "sort": -1.3}) is None
