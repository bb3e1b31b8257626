"""The judge of a comparison, on answers changed by known amounts; real graphs are compared in tests/exporter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from runtime.compare import Comparison, compare, judge, render
from runtime.errors import InputError
from runtime.manifest import Mode
from runtime.recording import RecordedNoise, Recording
from runtime.replay import PROBES, Answer, GivenText, replay_given
from runtime.rows import Rows, StepResult
from tests.runtime.test_recording import TEXTS, VOCABULARY, recording


def judged(
    given: Recording,
    change: Callable[[np.ndarray], object] = lambda logits: None,
    gate_change: Callable[[np.ndarray], object] = lambda gate: None,
    *,
    is_cpu: bool = True,
    accept_noise: bool = False,
) -> Comparison:
    """The recorded answers themselves, those of the gate's second text changed."""
    found = [
        [Answer(a.logits.copy(), None if a.gate is None else a.gate.copy()) for a in case] for case in given.answers
    ]
    answer = found[0][1]
    assert answer.gate is not None
    change(answer.logits)
    gate_change(answer.gate)
    return judge(given, found, is_cpu=is_cpu, accept_noise=accept_noise)


def red(comparison: Comparison) -> set[str]:
    return {check.name for check in comparison.checks if not check.passed}


def add(place: tuple[int, ...], value: float) -> Callable[[np.ndarray], object]:
    def change(array: np.ndarray) -> None:
        array[place] += value

    return change


def test_equal_passes_and_says_over_what() -> None:
    comparison = judged(recording())
    assert comparison.passed
    assert (comparison.stage, comparison.texts, comparison.positions) == ("A", 4, 4 * (PROBES + 3))
    assert [check.name for check in comparison.checks] == ["logits", "gate", "kld_mean", "kld_p99", "argmax_flips"]
    assert "stage A: 4 texts" in render(comparison)


def test_a_wrong_logit_is_seen_with_its_place() -> None:
    comparison = judged(recording(), add((PROBES + 1, 4), 0.5))
    assert {"logits", "kld_mean", "kld_p99"} <= red(comparison)
    assert next(check for check in comparison.checks if check.name == "logits").where == "gate, text 1, decode step 1"
    comparison = judged(recording(), add((PROBES - 1, 4), 0.5))
    assert comparison.checks[0].where == "gate, text 1, prefill position 3"


def test_the_fp32_gate_may_move_further_on_a_gpu() -> None:
    change = add((2, 1, 1), 5e-5)
    assert red(judged(recording(), gate_change=change)) == {"gate"}
    assert judged(recording(), gate_change=change, is_cpu=False).passed
    assert red(judged(recording(), gate_change=add((2, 1, 1), 5e-4), is_cpu=False)) == {"gate"}


def test_fp16_is_judged_by_pytorchs_own_noise() -> None:
    def scaled(by: float) -> Callable[[np.ndarray], object]:
        return lambda logits: logits.__imul__(np.float32(1 + by))

    quiet = recording("float16", RecordedNoise(kld_mean=1e-8))
    noisy = recording("float16", RecordedNoise(kld_mean=2e-6))
    coarse = recording("float16", RecordedNoise(kld_mean=2e-5))
    some, more = scaled(0.004), scaled(0.01)  # mean divergences of a few 1e-6 and 1e-5
    values = [judged(quiet, change).checks[1].value for change in (some, more)]
    assert 1e-6 < values[0] < 6e-6 < 1e-5 < values[1] < 6e-5
    assert red(judged(quiet)) == set()
    assert "kld_mean" in red(judged(quiet, some))
    assert judged(noisy, some).passed
    assert "kld_mean" in red(judged(coarse, more)), "no noise excuses more than 1e-5"
    assert judged(coarse, more, accept_noise=True).passed
    assert "--accept-noise" in render(judged(coarse, more))
    tail = recording("float16", RecordedNoise(kld_mean=2e-6, kld_p99=1e-3))
    assert judged(tail, some).checks[2].limit == pytest.approx(3e-3), "PyTorch's own tail"
    assert "--accept-noise" not in render(judged(noisy, some))


@pytest.mark.parametrize(("dtype", "margin"), [("float32", 1e-3), ("float16", 0.1), ("bfloat16", 0.5)])
def test_an_argmax_may_flip_only_at_a_tie(dtype: str, margin: float) -> None:
    def flip_at(gap: float) -> Comparison:
        given = recording(dtype)
        logits = given.answers[0][1].logits
        logits[0] = 0
        logits[0, 2], logits[0, 3] = gap, 0.0
        logits[0, 4:] = -1

        def change(array: np.ndarray) -> None:
            array[0, 3] = gap * 1.01

        return judged(given, change)

    assert "argmax_flips" in red(flip_at(margin * 1.5))
    assert "argmax_flips" not in red(flip_at(margin * 0.5))


def test_nan_is_never_within_a_limit() -> None:
    for dtype in ("float32", "float16"):
        assert {"kld_mean", "kld_p99"} <= red(judged(recording(dtype), add((0, 0), np.nan)))
    assert "gate" in red(judged(recording(), gate_change=add((0, 0, 0), np.nan)))


def test_adapters_that_change_nothing_prove_nothing() -> None:
    given = recording("float16")
    idle = [case.model_copy(update={"adapters_matter": 0.05}) for case in given.header.cases]
    header = given.header.model_copy(update={"cases": tuple(idle)})
    comparison = judged(replace(given, header=header))
    assert red(comparison) == set()
    assert not comparison.passed
    assert "a graph without experts would pass" in render(comparison)
    plain = header.model_copy(update={"mode": Mode.STATIC, "mix": {"a": 0.0}})
    assert judged(replace(given, header=plain)).passed, "a static base has no experts to lose"


class Talker:
    """A session that answers each token with logits which say how long its row is; it remembers what it was asked."""

    provider = "cpu"

    def __init__(self, carries: bool = True) -> None:
        from runtime.signature import CacheStyle, SignatureShape, signature_from_shape

        cache = CacheStyle.APPEND if carries else CacheStyle.NONE
        shape = SignatureShape(VOCABULARY, (1,), (2,), scalings=2, experts=3, gate=True, cache=cache)
        self.signature = signature_from_shape(shape)
        self.asked: list[int] = []
        self.lengths = np.zeros(0, np.int64)
        self.keeps = carries

    def allocate(self, slots: int, adapters: object = None) -> None:
        self.lengths = np.zeros(slots, np.int64)

    def truncate(self, slot: int, length: int) -> None:
        self.lengths[slot] = length

    def step(self, rows: Rows) -> StepResult:
        self.asked.append(rows.logit_index.shape[1])
        before = self.lengths[rows.slots].copy()
        at = before[:, None] + rows.logit_index
        if self.keeps:
            self.lengths[rows.slots] = before + rows.counts
        gate = np.broadcast_to(before[:, None, None, None], (*rows.tokens.shape, 2, 3)).astype(np.float32)
        return StepResult(np.repeat(at[..., None], VOCABULARY, -1).astype(np.float32), gate)


@pytest.mark.parametrize("carries", [True, False])
def test_given_texts_are_fed_as_they_are_and_one_position_is_asked_a_step(carries: bool) -> None:
    session = Talker(carries)
    texts = [GivenText(prompt, tokens) for prompt, tokens in TEXTS]
    row = np.zeros((2, 3), np.float32)
    found = replay_given(session, texts, row, is_gated=True)  # type: ignore[arg-type]
    for text, answer in zip(texts, found, strict=True):
        assert answer.logits[:, 0].tolist() == text.positions.tolist()
        assert answer.gate is not None
        assert len(answer.gate) == len(text.tokens)
    assert max(session.asked) == 1
    if carries:
        assert session.lengths.tolist() == [5, 7, 5, 7], "each token is kept once, in both passes"


def test_a_batch_of_no_rows_is_refused() -> None:
    with pytest.raises(InputError, match="--batch-size: rows in one step; got 0"):
        compare(Talker(), recording(), batch=0)  # type: ignore[arg-type]
