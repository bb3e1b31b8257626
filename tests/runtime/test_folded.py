"""Folded scalings on tiny models: the tokens of frozen ones, in sessions without experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import GenerateOptions, InputError, Model, NumericError, Routed, Sampling, complete, load
from runtime.backends.ort import OrtSession
from runtime.decode import FoldCosts
from runtime.folded import TIMED, FoldedPasses
from runtime.frozen import FrozenPasses
from runtime.generate import generate
from runtime.passes import Routing
from runtime.rows import Rows, StepResult
from runtime.signature import CacheStyle
from tests.runtime.tiny_bundles import BYTE_SHAPE, SCALING_PASS, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, open_tiny, tiny_weights
from tests.same_tokens import Ties, seen_logits

# Folded weights are rounded once more, and the K/V of every step carry it on: 1.4e-4 on some processors.
FOLD_LIMIT = 1e-3

WEIGHTS = {
    n: a * np.float32(0.3 if n == "gate" else 1) for n, a in tiny_weights(BYTE_SHAPE).items()
}  # all experts count
PROMPTS: list[list[int]] = [[104, 101, 108], [5, 17, 3, 250, 8], [7], list(range(40, 53))]
FOLDED = GenerateOptions(max_new_tokens=16, decode="folded:2")


class Opened:
    """Sessions without experts, each with a mix in its weights, as a bundle's store would give them."""

    def __init__(self, folder: Path, shape: TinyShape, weights: dict[str, np.ndarray], left_out: int | None) -> None:
        self.folder, self.shape, self.left_out, self.weights = folder, shape, left_out, weights
        self.alive, self.mixes = 0, []  # type: ignore[var-annotated]

    def __call__(self, scalings: np.ndarray) -> OrtSession:
        """scalings [blocks, E]: W + the sum of s E, as the tiny graph has it."""
        self.mixes.append(scalings)
        self.alive += 1
        mixed = {name: array for name, array in self.weights.items() if not name.startswith(("expert", "gate"))}
        for block, row in enumerate(scalings):
            kept = [(e, share) for e, share in enumerate(row) if e != self.left_out]
            mixed[f"mlp_{block}"] = mixed[f"mlp_{block}"] + sum(
                share * self.weights[f"expert_{block}_{e}"] for e, share in kept
            )
        self.folder.mkdir(exist_ok=True)
        session = open_tiny(self.folder, dataclasses.replace(self.shape, experts=0, gate=False), mixed)
        close = session.close
        session.close = lambda: setattr(self, "alive", self.alive - 1) or close()  # type: ignore[method-assign]
        return session


def fold_in(
    monkeypatch: pytest.MonkeyPatch, folder: Path, shape: TinyShape = BYTE_SHAPE, left_out: int | None = None
) -> Opened:
    """Let models fold without a weight store."""
    opened = Opened(folder, shape, WEIGHTS, left_out)
    monkeypatch.setattr(Model, "folding_of", lambda self, graph: object())
    monkeypatch.setattr(Model, "open_folded", lambda self, folding, scalings: opened(scalings))
    return opened


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    with load(tiny_bundle(folder, weights=WEIGHTS, end=()), threads=1) as model:
        yield model


def compare(model: Model, prompts: list[Any], options: GenerateOptions, ties: Ties) -> list[Any]:
    """Folded against frozen."""
    assert isinstance(options.decode, str)
    with seen_logits() as want:
        complete(model, prompts, dataclasses.replace(options, decode=options.decode.replace("folded", "frozen")))
    with seen_logits() as got:
        found = complete(model, prompts, options)
    for number in want:
        ties.compare(want[number], got[number], f"prompt {number}")
    return found


@pytest.mark.parametrize("cache", [CacheStyle.APPEND, CacheStyle.ALIAS])
@pytest.mark.parametrize("freeze", ["", ":0", ":1", ":5"])
def test_folded_gives_the_tokens_of_frozen(
    tmp_path: Path, cache: CacheStyle, freeze: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, ties = dataclasses.replace(BYTE_SHAPE, cache=cache), Ties(limit=FOLD_LIMIT)
    opened = fold_in(monkeypatch, tmp_path / "folded", shape)
    with load(tiny_bundle(tmp_path / "b", shape, weights=WEIGHTS, end=()), threads=1) as model:
        found = compare(model, PROMPTS, dataclasses.replace(FOLDED, decode=f"folded{freeze}"), ties)
        exact = complete(model, PROMPTS, dataclasses.replace(FOLDED, decode="exact"))
    ties.check()
    assert opened.alive == 0
    assert len(opened.mixes) == len(PROMPTS)
    assert [each.token_ids for each in found] != [each.token_ids for each in exact]  # the scalings matter
    assert all(each.folded.seconds > 0 for each in found)


def test_an_expert_less_is_noticed(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for left_out in range(BYTE_SHAPE.experts):
        fold_in(monkeypatch, tmp_path / "folded", left_out=left_out)
        with pytest.raises(AssertionError, match=r"another token at step|logits differ"):
            compare(model, PROMPTS, FOLDED, Ties(limit=FOLD_LIMIT))


def test_the_kv_so_far_is_taken_along(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold_in(monkeypatch, tmp_path / "folded")
    entries = OrtSession.entries
    monkeypatch.setattr(
        OrtSession, "entries", lambda self, slot: {name: 0 * each for name, each in entries(self, slot).items()}
    )
    with pytest.raises(AssertionError, match=r"another token at step|logits differ"):
        compare(model, PROMPTS, FOLDED, Ties(limit=FOLD_LIMIT))


def test_each_request_has_a_session_of_its_own_and_others_run_together(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without a gate have one pass already, and none is folded for them."""
    opened, ties, sizes = fold_in(monkeypatch, tmp_path / "folded"), Ties(), []
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda rows: sizes.append(len(rows.counts)) or step(rows))
    rows = [Routed(prompt, name) for prompt in PROMPTS[:2] for name in ("xlora", "math", "base", "plain")]
    found = compare(model, rows, FOLDED, ties)
    ties.check()
    assert [each.folded is not None for each in found] == [True, False, False, False] * 2
    assert len(opened.mixes) == 2
    half = len(sizes) // 2
    assert set(sizes[half:]) == {1, 4}


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6, 7, 8])
def test_short_answers_are_not_folded(
    model: Model, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt's token, then TIMED of one pass; a token later it is folded, two later a folded step is timed."""
    opened = fold_in(monkeypatch, tmp_path / "folded")
    [found] = complete(model, PROMPTS[:1], GenerateOptions(max_new_tokens=tokens, decode="folded"))
    is_folded = tokens > 1 + TIMED
    assert (found.folded is not None, len(opened.mixes), opened.alive) == (is_folded, is_folded, 0)
    if found.folded is not None:
        assert (found.folded.folded_step is not None) is (tokens > 2 + TIMED)
        assert (found.folded.break_even is not None) is (tokens > 2 + TIMED)


def test_the_mix_that_is_folded_is_what_stays(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = fold_in(monkeypatch, tmp_path / "folded")
    for freeze in ("last", "mean"):
        for prompt in PROMPTS:
            complete(model, [prompt], dataclasses.replace(FOLDED, decode=decode_of(freeze)))
    assert len({mix.tobytes() for mix in opened.mixes}) == 2 * len(PROMPTS)
    assert all(mix.shape == (BYTE_SHAPE.blocks, BYTE_SHAPE.experts) for mix in opened.mixes)
    for mix in opened.mixes:
        np.testing.assert_allclose(mix.sum(-1), 1, atol=1e-5)  # of softmax gates


def decode_of(freeze: str) -> Any:
    from runtime.decode import decode_from_text

    return decode_from_text("folded:1", freeze)


def test_its_distance_from_exact_is_that_of_frozen(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold_in(monkeypatch, tmp_path / "folded")
    options = dataclasses.replace(FOLDED, measure_frozen=True)
    [folded] = complete(model, PROMPTS[:1], options)
    [frozen] = complete(model, PROMPTS[:1], dataclasses.replace(options, decode="frozen:2"))
    assert folded.divergence == frozen.divergence
    assert folded.divergence is not None
    assert folded.divergence.tokens == 13
    assert folded.divergence.kl_mean > 0.01


def test_sampled_tokens_are_those_of_frozen(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold_in(monkeypatch, tmp_path / "folded")
    options = dataclasses.replace(FOLDED, sampling=Sampling(0.7, seed=3))
    [folded] = complete(model, PROMPTS[:1], options)
    [frozen] = complete(model, PROMPTS[:1], dataclasses.replace(options, decode="frozen:2"))
    assert folded.token_ids == frozen.token_ids


def test_sessions_are_closed_when_nobody_reads_on(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = fold_in(monkeypatch, tmp_path / "folded")
    events = generate(model, PROMPTS[:1], FOLDED)
    for _ in range(10):
        next(events)
    assert opened.alive == 1
    other = generate(model, PROMPTS[1:2], GenerateOptions(max_new_tokens=3))
    next(other)
    with pytest.raises(InputError, match="another generation has begun"):
        next(events)
    assert opened.alive == 0
    assert len(list(other)) == 2


def one_row(tmp_path: Path, opened: Any, ticks: Any) -> tuple[OrtSession, FoldedPasses]:
    session = open_tiny(tmp_path, BYTE_SHAPE, WEIGHTS)
    routing = Routing(np.tile(np.float32(SCALING_PASS), (BYTE_SHAPE.blocks, 1)), is_gated=True)
    frozen = FrozenPasses(session, [routing], [3])
    return session, FoldedPasses(session, frozen, frozen, opened, lambda: float(next(ticks)))


def test_what_it_took_is_told_and_when_it_pays(tmp_path: Path) -> None:
    """A clock that ticks twice as fast with each reading; each step and the folding read it twice."""
    opened = Opened(tmp_path / "folded", BYTE_SHAPE, WEIGHTS, None)
    session, passes = one_row(tmp_path, opened, (2.0**n for n in count()))
    passes.forward(np.array([[1, 2, 3]]), np.array([3]))  # not frozen yet: reading 0
    for token in range(TIMED):  # readings 1, 2; 3, 4; 5, 6
        assert passes.costs is None
        passes.forward(np.array([[token]]), np.array([1]))
    passes.forward(np.array([[4]]), np.array([1]))  # folding: 7, 8; step: 9, 10
    assert passes.costs == FoldCosts(2.0**7, (2.0**3 + 2.0**5) / 2, None)
    passes.forward(np.array([[5]]), np.array([1]))  # 11, 12
    assert passes.costs == FoldCosts(2.0**7, (2.0**3 + 2.0**5) / 2, 2.0**11)
    assert len(opened.mixes) == 1
    passes.close()
    session.close()


def test_break_even() -> None:
    assert FoldCosts(10.0, 3.0, 1.0).break_even == 5.0
    assert FoldCosts(10.0, 1.0, 1.0).break_even == float("inf")
    assert FoldCosts(10.0, 1.0, None).break_even is None
    assert FoldCosts(10.0, None, 1.0).break_even is None


@pytest.mark.parametrize("fails", range(4))
def test_a_call_that_failed_can_be_repeated(tmp_path: Path, fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the frozen steps, when the session is opened, and in the folded steps."""
    found, step = [], OrtSession.step
    for failing in (-1, fails):
        steps, opened = count(), Opened(tmp_path / "folded", BYTE_SHAPE, WEIGHTS, None)

        def open_(scalings: np.ndarray, opened: Opened = opened, failing: int = failing) -> OrtSession:
            if failing == 3 and not opened.mixes:
                opened.mixes.append(None)
                raise InputError("the disk is gone")
            return opened(scalings)

        session, passes = one_row(tmp_path, open_, count())

        def stepped(self: OrtSession, rows: Rows, steps: Any = steps, failing: int = failing) -> StepResult:
            if next(steps) == (-1, 3, 7, -1)[failing]:
                raise NumericError("logits", (0,))
            return step(self, rows)

        logits, failed = [], 0
        with monkeypatch.context() as patch:
            patch.setattr(OrtSession, "step", stepped)
            for tokens in ([1, 2, 3], *([token] for token in range(4, 12))):
                call = np.array([tokens]), np.array([len(tokens)])
                try:
                    logits.append(passes.forward(*call))
                except (NumericError, InputError):
                    failed += 1
                    logits.append(passes.forward(*call))
        assert failed == (failing > 0)
        found.append(np.concatenate(logits))
        passes.close()
        session.close()
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("null", "only ONNX Runtime takes weights at run time; got null; need the backend ort. Fix: decode frozen"),
        ("ort", "the weight of blocks.0.mlp cannot be folded; got none; need a weight of its own in F32 or F16."),
    ],
)
def test_models_that_cannot_fold_say_so_before_they_begin(tmp_path: Path, backend: str, message: str) -> None:
    """The tiny bundle has its weights in its graphs."""
    with (
        load(tiny_bundle(tmp_path / "b", end=()), threads=1, backend=backend) as model,
        pytest.raises(InputError, match=message),
    ):
        generate(model, PROMPTS, FOLDED)


def test_without_a_gate_there_is_nothing_to_fold(tmp_path: Path) -> None:
    """Nor in a graph without caches: both have one way of decoding."""
    shape = dataclasses.replace(BYTE_SHAPE, cache=CacheStyle.NONE)
    for variant, path in (
        ("math", tiny_bundle(tmp_path / "a", end=())),
        ("xlora", tiny_bundle(tmp_path / "b", shape, end=())),
    ):
        with load(path, threads=1) as model:
            rows = [Routed(prompt, variant) for prompt in PROMPTS]
            want = [each.token_ids for each in complete(model, rows, dataclasses.replace(FOLDED, decode="exact"))]
            found = complete(model, rows, FOLDED)
        assert [each.token_ids for each in found] == want
        assert all(each.folded is None for each in found)
