"""Sampling: the kept sets against brute force, the frequencies, the seeds, the refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.sampling import Sampler, Sampling, kept, softmax

QUICK = settings(max_examples=150, deadline=None)
LOGITS = st.lists(st.sampled_from([-30.0, -2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 40.0]), min_size=1, max_size=9).map(
    np.float32
)


def choices(sampling: Sampling, logits: np.ndarray, count: int) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.choose(logits) for _ in range(count)]


@QUICK
@given(logits=LOGITS, k=st.integers(1, 12))
def test_top_k_keeps_the_k_likeliest(logits: np.ndarray, k: int) -> None:
    ids, _ = kept(logits, Sampling(1.0, top_k=k))
    want = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k]
    assert ids.tolist() == want


@QUICK
@given(logits=LOGITS, p=st.sampled_from([0.01, 0.3, 0.5, 0.77, 0.999]), k=st.none() | st.integers(1, 9))
def test_top_p_keeps_the_fewest_that_reach_p(logits: np.ndarray, p: float, k: int | None) -> None:
    """Brute force: try every size, take the first that holds a share of p among the top k."""
    ids, probabilities = kept(logits, Sampling(0.7, top_k=k, top_p=p))
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / 0.7)
    share = np.cumsum(weights / weights.sum())
    assume(not np.isclose(share, p, atol=1e-9).any())
    want = next((size for size in range(1, len(order) + 1) if share[size - 1] >= p), len(order))
    assert len(ids) == want
    assert ids.tolist() == order[: len(ids)]
    np.testing.assert_allclose(probabilities, (weights / weights.sum())[: len(ids)])


def test_top_p_of_one_keeps_all() -> None:
    assert len(kept(np.float32([90, 0, -90]), Sampling(1.0, top_p=1.0))[0]) == 3


def test_temperature_zero_is_greedy_and_ties_go_to_the_lower_id() -> None:
    assert choices(Sampling(), np.float32([1, 3, 3, 2]), 3) == [1, 1, 1]


@QUICK
@given(logits=LOGITS, seed=st.integers(0, 99))
def test_a_tiny_temperature_is_greedy(logits: np.ndarray, seed: int) -> None:
    picked = choices(Sampling(1e-9, seed=seed), logits, 4)
    assert all(logits[i] == logits.max() for i in picked)


def test_frequencies_follow_the_softmax() -> None:
    logits = np.float32([0.0, 1.0, 2.0, -3.0])
    picked = choices(Sampling(0.8, seed=5), logits, 20000)
    share = np.bincount(picked, minlength=4) / len(picked)
    np.testing.assert_allclose(share, softmax(logits, 0.8), atol=0.012)  # 3.5 standard errors


def test_frequencies_are_renormalised_over_the_kept() -> None:
    logits = np.log(np.float32([0.5, 0.3, 0.15, 0.05]))
    picked = choices(Sampling(1.0, top_p=0.75, seed=1), logits, 8000)
    share = np.bincount(picked, minlength=4) / len(picked)
    np.testing.assert_allclose(share, [0.625, 0.375, 0, 0], atol=0.02)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    logits = np.zeros(50, np.float32)
    assert choices(Sampling(1.0, seed=3), logits, 20) == choices(Sampling(1.0, seed=3), logits, 20)
    assert choices(Sampling(1.0, seed=3), logits, 20) != choices(Sampling(1.0, seed=4), logits, 20)
    assert choices(Sampling(1.0), logits, 20) != choices(Sampling(1.0), logits, 20)


def test_softmax_is_computed_in_float64() -> None:
    logits = np.float32([88.0, 0.0, -88.0])
    probabilities = softmax(logits, 1.0)
    assert probabilities.dtype == np.float64
    assert probabilities[2] == pytest.approx(np.exp(-176.0), rel=1e-9)
    assert softmax(logits, 1e-300).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature; got -0.1; need a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature; got nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k; got 0; need at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p; got 0.0; need more than 0, at most 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p; got 1.5"),
        ({"temperature": 1.0, "seed": -1}, "seed; got -1"),
        ({"temperature": 0.0, "top_p": 0.9}, "mean nothing at temperature; got 0; need a temperature above 0"),
        ({"temperature": 0.0, "seed": 1}, "mean nothing at temperature"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**fields)  # type: ignore[arg-type]


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(InputError, match="2 problems") as caught:
        Sampling(temperature=-1.0, top_k=0)
    assert "temperature" in str(caught.value)
    assert "top_k" in str(caught.value)
