"""Limits follow a model's own noise, between a floor and a cap, over a whole scenario; the report says so."""

from __future__ import annotations

import math

import pytest

from exporter.commands.checks import check_line
from exporter.verify import STAGE_A, Bound, Measures, Noise
from runtime.manifest import Check
from runtime.measures import Worst

BOUND = Bound(floor=1e-5, fixed=1e-3, cap=5e-2, factor=10.0)


@pytest.mark.parametrize(
    ("noise", "limit"), [(None, 1e-3), (0.0, 1e-5), (1e-7, 1e-5), (2e-6, 2e-5), (4e-3, 4e-2), (1.0, 5e-2)]
)
def test_a_limit_is_the_noise_times_the_factor_between_floor_and_cap(noise: float | None, limit: float) -> None:
    assert BOUND.limit(noise) == pytest.approx(limit)


@pytest.mark.parametrize("name", ["logits", "gate", "kld"])
def test_no_model_is_so_noisy_that_any_graph_passes(name: str) -> None:
    bound = getattr(STAGE_A, name)
    assert bound.floor < bound.cap
    assert math.isfinite(bound.cap)
    assert bound.limit(math.inf) == bound.cap
    assert bound.limit(None) <= bound.cap


def measures_with(*values: tuple[float, float | None]) -> Measures:
    """What prompts of one scenario leave: the largest |d| of each, and its noise where fp64 products were asked."""
    measures = Measures()
    measures.begin("gate")
    for number, (value, noise) in enumerate(values):
        if noise is not None:
            measures.learn(Noise(logits=noise), 1)
        measures.pending.append(("logits", value, f"prompt {number}"))
    measures.settle()
    return measures


def test_the_noise_of_one_prompt_counts_for_the_scenario() -> None:
    """A value is judged once the whole scenario is known, not by the prompt that came first."""
    check = measures_with((5e-5, 1e-7), (6e-5, 2e-5)).logits.check("logits")
    assert (check.passed, check.noise) == (True, 2e-5)
    assert check.limit == pytest.approx(2e-4)
    assert check.where == "prompt 1"


def test_the_noise_of_one_scenario_does_not_excuse_another() -> None:
    measures = measures_with((6e-5, 2e-5))
    measures.begin("base")
    measures.learn(Noise(logits=1e-7), 1)
    measures.pending.append(("logits", 5e-5, "base, prompt 0"))
    measures.settle()
    check = measures.logits.check("logits")
    assert not check.passed
    assert check.where == "base, prompt 0"


def test_a_value_above_the_cap_fails_however_noisy_the_model_is() -> None:
    check = measures_with((6e-2, 1.0)).logits.check("logits")
    assert (check.passed, check.limit, check.noise) == (False, STAGE_A.logits.cap, 1.0)


def test_nan_is_beyond_every_limit() -> None:
    worst = Worst(1.0)
    worst.see(math.nan, "somewhere", 1.0)
    assert not worst.check("logits").passed


def test_a_line_shows_value_limit_share_and_noise() -> None:
    line = check_line(Check(name="gate", value=9.7e-6, limit=4.8e-5, passed=True, where="gate, prompt 3", noise=4.8e-6))
    for part in ("gate", "9.7e-06", "4.8e-05", "20%", "4.8e-06", "ok", "gate, prompt 3"):
        assert part in line, (part, line)
