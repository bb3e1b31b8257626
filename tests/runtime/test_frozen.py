"""Frozen scalings against plain numpy, their steps, and their measured distance from exact decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import GenerateOptions, Model, NumericError, Routed, Sampling, complete, load
from runtime.backends.ort import OrtSession
from runtime.decode import Decode, DecodeMode, Freeze, decode_from_text
from runtime.errors import InputError
from runtime.frozen import FrozenPasses, FrozenText, Scalings, frozen_divergence
from runtime.generate import generate, prepare
from runtime.passes import Routing
from runtime.rows import Rows, StepResult
from runtime.session import SessionSettings
from tests.runtime.tiny_bundles import BYTE_SHAPE, SCALING_PASS, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, open_tiny, reference, softmax, tiny_weights
from tests.same_tokens import Ties, greedy_ids, seen_logits

WEIGHTS = tiny_weights(BYTE_SHAPE)
PROMPTS: list[list[int]] = [[104, 101, 108], [5, 17, 3, 250, 8], [7], list(range(40, 53))]
COUNT = 12


def frozen(after: int = 0, freeze: Freeze = Freeze.LAST, **more: Any) -> GenerateOptions:
    return GenerateOptions(max_new_tokens=COUNT, decode=Decode(DecodeMode.FROZEN, after, freeze), **more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with load(tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", end=()), threads=1) as model:
        yield model


def scaled(ids: Sequence[int], until: int | None, freeze: Freeze) -> np.ndarray:
    """Logits [S, V] by numpy: the gate's scalings up to `until`, then what stays of them; None: the gate's."""
    constant = np.broadcast_to(np.float32(SCALING_PASS), (len(ids), BYTE_SHAPE.blocks, BYTE_SHAPE.experts))
    scalings = reference(BYTE_SHAPE, WEIGHTS, ids, constant)[1]
    if until is not None:
        seen = scalings[:until]
        scalings[until:] = seen[-1] if freeze is Freeze.LAST else seen.mean(0)
    return reference(BYTE_SHAPE, WEIGHTS, ids, scalings)[0]


def greedy(prompt: Sequence[int], after: int, freeze: Freeze) -> list[np.ndarray]:
    """The logits of each new token, by whole-sequence recomputation."""
    ids, found = list(prompt), []
    for _ in range(COUNT):
        found.append(scaled(ids, len(prompt) + after, freeze)[-1])
        ids.append(int(found[-1].argmax()))
    return found


@pytest.mark.parametrize("freeze", list(Freeze))
@pytest.mark.parametrize("after", [0, 1, 4, 50])
def test_scalings_stay_from_that_token_on(model: Model, after: int, freeze: Freeze) -> None:
    with seen_logits() as seen:
        complete(model, PROMPTS, frozen(after, freeze))
    for number, prompt in enumerate(PROMPTS):
        want = greedy(prompt, after, freeze)
        assert greedy_ids(seen[number]) == greedy_ids(want)
        np.testing.assert_allclose(seen[number], want, rtol=1e-3, atol=1e-3)  # steep gates, sums in another order


def test_what_stays_matters(model: Model) -> None:
    """Otherwise the test above would prove little."""
    ways = [frozen(0), frozen(0, Freeze.MEAN), frozen(4), frozen(4, Freeze.MEAN), frozen(50)]
    found = {tuple(each.token_ids for each in complete(model, PROMPTS, way)) for way in ways}
    assert len(found) == len(ways)
    exact = tuple(each.token_ids for each in complete(model, PROMPTS, dataclasses.replace(ways[0], decode="exact")))
    assert exact in found


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("chunk", [512, 3])
def test_rows_of_a_batch_get_what_they_get_alone(
    model: Model, after: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.routing.CHUNK", chunk)
    ties = Ties()
    for freeze in Freeze:
        rows = [Routed(prompt, name) for prompt in PROMPTS for name in ("xlora", "math", "base")]
        with seen_logits() as together:
            complete(model, rows, frozen(after, freeze))
        for number, row in enumerate(rows):
            with seen_logits() as alone:
                complete(model, [row], frozen(after, freeze))
            ties.compare(alone[0], together[number], f"{row}")
    ties.check()


@pytest.mark.parametrize(("after", "batches"), [(0, [2, 3]), (2, [2, 3] * 3), (50, [2, 3] * COUNT)])
def test_one_step_a_token_once_they_stay(
    model: Model, after: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Rows] = []
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda rows: steps.append(rows) or step(rows))
    rows = [Routed(PROMPTS[0], "xlora"), Routed(PROMPTS[1], "math"), Routed(PROMPTS[2], "xlora")]
    complete(model, rows, frozen(after))
    assert [len(rows.counts) for rows in steps] == batches + [3] * (COUNT - len(batches) // 2)


def test_rows_may_fill_all_positions_and_end_at_different_times(model: Model) -> None:
    options = GenerateOptions(decode="frozen:2", measure_frozen=True)
    found = complete(model, [[3] * 198, [1], [2] * 200], options)
    assert [len(each.token_ids) for each in found] == [3, 128, 1]
    assert [each.divergence and each.divergence.tokens for each in found] == [0, 125, 0]
    assert found[1].token_ids == complete(model, [[1]], options)[0].token_ids


def test_a_step_that_failed_can_be_repeated(tmp_path: Path) -> None:
    shape, failing = TinyShape(), {3}
    calls = 0

    class Failing(OrtSession):
        def step(self, rows: Rows) -> StepResult:
            nonlocal calls
            calls += 1
            if calls in failing:
                raise NumericError("logits", (0,))
            return super().step(rows)

    open_tiny(tmp_path, shape, tiny_weights(shape)).close()
    for place in range(1, 7):
        found = []
        for failing in (set(), {place}):  # noqa: B007 - the session reads it
            calls = 0
            session = Failing(tmp_path / "dynamic.onnx", shape.signature, SessionSettings(60, threads=1))
            routing = Routing(np.tile(np.float32(SCALING_PASS), (shape.blocks, 1)), is_gated=True)
            passes = FrozenPasses(session, [routing], [4], Freeze.MEAN)
            logits = []
            for tokens in ([1, 2, 3], [4], [5], [6]):
                call = np.array([tokens]), np.array([len(tokens)])
                try:
                    logits.append(passes.forward(*call))
                except NumericError:
                    logits.append(passes.forward(*call))
            found.append(np.concatenate(logits))
            session.close()
        np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_straddling_a_step_keeps_the_first_tokens_scalings() -> None:
    """Two tokens of a gate of one number, then what stays, in one step and in two."""
    gate = np.float32([[1, 5, 9, 9], [2, 4, 6, 8]])[:, :, None, None]
    for freeze, stays in ((Freeze.LAST, [[5, 5], [6, 8]]), (Freeze.MEAN, [[3, 3], [4, 4]])):
        scalings = Scalings(2, freeze)
        found = scalings.of(gate, np.array([2, 3]))[:, :, 0, 0]
        np.testing.assert_array_equal(found[0], [1, 5, *stays[0]])
        np.testing.assert_array_equal(found[1], [2, 4, 6, 6 if freeze is Freeze.LAST else 4])
        scalings.keep(gate, np.array([2, 3]))
        assert scalings.stays(1)[:, 0, 0, 0].tolist() == [stays[0][0], stays[1][0]]


# --- the distance from exact ----------------------------------------------------------------------


def expected(prompt: Sequence[int], tokens: Sequence[int], after: int, freeze: Freeze) -> tuple[int, float, float]:
    text, until = [*prompt, *tokens[:-1]], len(prompt) + after
    p, q = (softmax(scaled(text, limit, freeze).astype(np.float64))[until:] for limit in (None, until))
    kl = (p * np.log(p / q)).sum(-1)
    return len(kl), float(kl.mean()), float((p.argmax(-1) == q.argmax(-1)).mean())


@pytest.mark.parametrize("freeze", list(Freeze))
@pytest.mark.parametrize("after", [0, 4])
@pytest.mark.parametrize("compared", [1, 5, 16])
def test_the_distance_is_numpys(
    model: Model, after: int, freeze: Freeze, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of positions is compared at a time."""
    monkeypatch.setattr("runtime.frozen.COMPARED", compared)
    far = 0.0
    for prompt, found in zip(
        PROMPTS, complete(model, PROMPTS, frozen(after, freeze, measure_frozen=True)), strict=True
    ):
        assert found.divergence is not None
        tokens, kl, same = expected(prompt, found.token_ids, after, freeze)
        assert found.divergence.tokens == tokens == COUNT - 1 - after
        assert found.divergence.kl_mean == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert found.divergence.same_top == pytest.approx(same)
        far = max(far, kl)
    assert far > 0.1


def test_sampled_texts_are_measured_too(model: Model) -> None:
    options = frozen(1, sampling=Sampling(1.0, seed=4), measure_frozen=True)
    [found] = complete(model, PROMPTS[:1], options)
    assert found.divergence is not None
    assert found.divergence.kl_mean == pytest.approx(expected(PROMPTS[0], found.token_ids, 1, Freeze.LAST)[1], rel=1e-3)
    assert found.timings.drafts == 0


def test_without_experts_there_is_no_distance(tmp_path: Path) -> None:
    weights = {name: array * (not name.startswith("expert")) for name, array in WEIGHTS.items()}
    with load(tiny_bundle(tmp_path / "b", weights=weights, end=()), threads=1) as model:
        [found] = complete(model, PROMPTS[:1], frozen(measure_frozen=True))
    assert found.divergence is not None
    assert found.divergence.kl_mean < 1e-9
    assert found.divergence.same_top == 1


def test_only_rows_under_the_gate_are_measured_and_only_if_asked(model: Model) -> None:
    rows = [Routed(PROMPTS[0], name) for name in ("xlora", "math", "plain")]
    found = complete(model, rows, frozen(measure_frozen=True))
    assert [each.divergence is not None for each in found] == [True, False, False]
    assert complete(model, rows, frozen())[0].divergence is None
    assert complete(model, rows, GenerateOptions(decode="paired", measure_frozen=True))[0].divergence is None


def test_measuring_waits_its_turn(model: Model) -> None:
    """Another generation began after the last token: its caches are not taken."""
    requests, events = prepare(model, PROMPTS[:1], frozen(measure_frozen=True))
    for _ in range(COUNT):
        next(events)
    other = generate(model, PROMPTS[1:2], GenerateOptions(max_new_tokens=3))
    next(other)
    with pytest.raises(InputError, match="another generation has begun"):
        next(events)
    assert len(list(other)) == 2
    assert requests[0].is_done


def test_bad_numbers_while_measuring_name_the_prompt(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*rest: object) -> None:
        raise NumericError("logits", (0,))

    monkeypatch.setattr("runtime.generate.frozen_divergence", fails)
    with pytest.raises(NumericError, match="for prompt 2 of the step"):
        complete(model, [Routed(PROMPTS[0], "math"), PROMPTS[1]], frozen(measure_frozen=True))


def test_a_text_that_ends_before_the_scalings_stay_has_no_distance(model: Model) -> None:
    routing = Routing(np.tile(np.float32(SCALING_PASS), (BYTE_SHAPE.blocks, 1)), is_gated=True)
    found = frozen_divergence(model.session, routing, FrozenText([1, 2, 3], 3, Freeze.LAST))
    assert (found.tokens, found.kl_mean, found.same_top) == (0, 0.0, 1.0)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "freeze", "decode"),
    [
        ("exact", None, Decode(DecodeMode.EXACT)),
        ("paired", None, Decode(DecodeMode.PAIRED)),
        ("auto", None, Decode()),
        ("frozen", None, Decode(DecodeMode.FROZEN)),
        ("frozen:0", "last", Decode(DecodeMode.FROZEN)),
        ("frozen:12", "mean", Decode(DecodeMode.FROZEN, 12, Freeze.MEAN)),
        ("folded", None, Decode(DecodeMode.FOLDED)),
        ("folded:3", "mean", Decode(DecodeMode.FOLDED, 3, Freeze.MEAN)),
        ("paired:3", None, Decode(DecodeMode.PAIRED, drafts=3)),
        ("lookup", None, Decode(DecodeMode.LOOKUP, drafts=8)),
        ("lookup:64", None, Decode(DecodeMode.LOOKUP, drafts=64)),
    ],
)
def test_words(text: str, freeze: str | None, decode: Decode) -> None:
    assert decode_from_text(text, freeze) == decode


@pytest.mark.parametrize(
    "text",
    ["", "Exact", "pair", "exact:3", "auto:", "frozen:", "frozen:-1", "frozen:1.5", "frozen:²", "auto:2", "lookup:"],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(
        InputError,
        match=r"no such way to decode; got .*; need exact, (\w+\[:K\], ){3}folded\[:K\] or auto",
    ):
        GenerateOptions(decode=text)


@pytest.mark.parametrize(
    ("text", "freeze", "message"),
    [
        ("lookup", "last", "only frozen scalings are frozen; got 'freeze last with decode lookup'"),
        ("paired:0", None, "that many drafts at a time cannot be; got 'paired:0'; need paired:K with K from 1 to 64"),
        ("lookup:65", None, "that many drafts at a time cannot be; got 'lookup:65'; need lookup:K with K from 1 to 64"),
        ("frozen", "first", "no such way to freeze; got 'first'; need last or mean"),
        (
            "exact",
            "last",
            "only frozen scalings are frozen; got 'freeze last with decode exact'; need decode frozen or folded",
        ),
    ],
)
def test_other_settings_are_refused(text: str, freeze: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_from_text(text, freeze)
