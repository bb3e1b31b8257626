"""Several drafts at a time on tiny models: the tokens of exact decoding, in fewer steps, whatever is drafted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import GenerateOptions, InputError, Model, NumericError, Routed, complete, load
from runtime.backends.ort import OrtSession
from runtime.drafted import DraftedPasses
from runtime.generate import generate, prepare
from runtime.lookup import looked_up
from runtime.passes import ExactPasses, Routing
from runtime.request import Request
from runtime.rows import Rows
from runtime.session import SessionSettings, StepLimits
from runtime.signature import CacheStyle
from tests.runtime import fake_tensorrt
from tests.runtime.compared_decoding import Failing, compare, draft_anything, random_prompts
from tests.runtime.tiny_bundles import BYTE_SHAPE, SCALING_PASS, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, open_tiny, tiny_weights
from tests.same_tokens import Ties


def calm_weights(shape: TinyShape, seed: int = 0) -> dict[str, np.ndarray]:
    """Less steep: else `exact` itself lies 4e-4 from fp64 after a dozen tokens, and wide steps sum in another order."""
    steep = ("gate", "q_", "k_")
    return {n: a * np.float32(0.5 if n.startswith(steep) else 1) for n, a in tiny_weights(shape, seed).items()}


WEIGHTS = calm_weights(BYTE_SHAPE)
SMALL = TinyShape(vocab=40, max_positions=40)
PROMPTS: list[str | Sequence[int]] = ["hello", [5, 17, 3], "日", "a longer prompt than the others, by far"]
EXACT = GenerateOptions(max_new_tokens=12, decode="exact")
WAYS = ("paired:2", "paired:5", "lookup:1", "lookup:6")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    with load(tiny_bundle(folder, weights=WEIGHTS, end=()), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Experts of zeros: the scaling pass computes what the main pass does, so its drafts come true."""
    weights = {name: array * (not name.startswith("expert")) for name, array in WEIGHTS.items()}
    folder = tmp_path_factory.mktemp("bundles") / "plain"
    with load(tiny_bundle(folder, weights=weights, end=()), threads=1) as model:
        yield model


def way(decode: str) -> GenerateOptions:
    return dataclasses.replace(EXACT, decode=decode)


def seen_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """What the model's session is asked."""
    seen: list[Rows] = []
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda rows: seen.append(rows) or step(rows))
    return seen


def foresee(monkeypatch: pytest.MonkeyPatch, texts: Sequence[Sequence[int]], wrong: int | None = None) -> None:
    """Requests look up what will come; the draft of the place `wrong` of each text is another."""

    def found(self: Request, count: int) -> list[int]:
        start = len(self.events)
        return [
            (token + (place == wrong)) % 300
            for place, token in enumerate(texts[self.number])
            if start <= place < start + count
        ]

    def look_up(self: Request, count: int) -> list[int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("runtime.request.looked_up", lambda text, count: found(self, count))
            return original(self, count)

    original = Request.look_up
    monkeypatch.setattr(Request, "look_up", look_up)


# --- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [CacheStyle.APPEND, CacheStyle.ALIAS])
def test_hundreds_of_prompts_get_the_tokens_of_exact(tmp_path: Path, cache: CacheStyle) -> None:
    """Random models, batches, lengths and stop tokens."""
    random, ties, counts = np.random.default_rng(1), Ties(), {each: np.zeros(3, int) for each in WAYS}
    for seed in range(3):
        shape = dataclasses.replace(SMALL, cache=cache)
        path = tiny_bundle(tmp_path / str(seed), shape, weights=calm_weights(shape, seed), tokenizer=False, end=())
        with load(path, threads=1) as model:
            for number in range(20):
                prompts = random_prompts(random, int(random.integers(1, 12)), shape.vocab)
                stop = tuple(random.integers(0, shape.vocab, 1).tolist())
                options = GenerateOptions(max_new_tokens=int(random.integers(2, 25)), stop_token_ids=stop)
                decode = WAYS[number % len(WAYS)]
                found = compare(model, prompts, options, decode, ties)
                for each in found:
                    counts[decode] += (1, each.timings.drafts, each.timings.accepted)
    ties.check()
    for compared, drafts, accepted in counts.values():
        assert compared > 60
        assert 0 < accepted < drafts  # drafts came true, and others did not


@pytest.mark.parametrize("decode", WAYS[1::2])
@pytest.mark.parametrize("chunk", [512, 3])
def test_gated_rows_among_rows_of_constants(
    model: Model, decode: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged prompts in chunks, some of which end exactly at a border."""
    monkeypatch.setattr("runtime.routing.CHUNK", chunk)
    random, ties = np.random.default_rng(2), Ties()
    for _ in range(6):
        prompts = random_prompts(random, 6, 300, 12)
        variants = random.choice(["xlora", "math", "base"], 6)
        compare(model, [Routed(*each) for each in zip(prompts, variants, strict=True)], EXACT, decode, ties)
    ties.check()


@pytest.mark.parametrize("decode", WAYS[1::2])
def test_rows_that_end_at_different_times(model: Model, decode: str) -> None:
    ties = Ties()
    free = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
    for row in range(len(PROMPTS)):
        for place in (0, 1, 4):
            compare(model, PROMPTS, dataclasses.replace(EXACT, stop_token_ids=(free[row][place],)), decode, ties)
    ties.check()


@pytest.mark.parametrize("decode", WAYS[1::2])
def test_rows_may_fill_all_positions(model: Model, decode: str) -> None:
    """No draft passes the last position."""
    ties = Ties()
    found = compare(model, [[3] * 198, [4] * 190, [1], [2] * 200], GenerateOptions(), decode, ties)
    assert [len(each.token_ids) for each in found] == [3, 11, 128, 1]
    ties.check()


@pytest.mark.parametrize("decode", WAYS[1::2])
def test_it_does_not_matter_what_is_drafted(model: Model, decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random, ties = np.random.default_rng(3), Ties()
    common = sorted({token for each in complete(model, PROMPTS, EXACT) for token in each.token_ids})
    draft_anything(monkeypatch, lambda: int(random.choice(common)))
    monkeypatch.setattr(
        "runtime.request.looked_up", lambda text, count: random.choice(common, random.integers(0, count + 1)).tolist()
    )
    for _ in range(10):
        compare(model, PROMPTS, EXACT, decode, ties)
    ties.check()


@pytest.mark.parametrize("decode", WAYS[1::2])
def test_wrong_drafts_that_stay_in_the_cache_are_noticed(
    model: Model, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.request.looked_up", lambda text, count: [7] * count)
    monkeypatch.setattr(OrtSession, "truncate", lambda self, slot, length: None)
    with pytest.raises(AssertionError, match=r"another token at step|logits differ"):
        compare(model, PROMPTS, EXACT, decode, Ties())


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("cache", [CacheStyle.APPEND, CacheStyle.ALIAS])
def test_the_other_backend_gives_the_same(cache: CacheStyle, chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's session, on the fake GPU: captured graphs, slots that are cut, two widths of batch."""
    fake_tensorrt.install(monkeypatch)
    shape = dataclasses.replace(SMALL, cache=cache)
    session, ties = fake_tensorrt.open_fake(shape, tiny_weights(shape)), Ties()
    gate = Routing(np.tile(np.float32(SCALING_PASS), (shape.blocks, 1)), is_gated=True)
    code = Routing(np.tile(np.float32((0, 1, 0)), (shape.blocks, 1)))
    for routings in ([gate], [code, gate]):
        prompts = [[1, 2, 3], [4, 5]][: len(routings)]
        want = decoded(ExactPasses(session, routings), [], prompts, 12)
        guessers = [Guesser(prompt, want[:, row]) for row, prompt in enumerate(prompts)]
        got = decoded(DraftedPasses(session, routings, guessers, 3, chained=chained), guessers, prompts, 12)
        for row in range(len(prompts)):
            ties.compare(list(want[:, row]), list(got[:, row]), f"row {row}")
    ties.check()
    session.close()


class Guesser:
    """Guesses the likeliest token, and looks up what came in another run, every third token wrongly."""

    def __init__(self, prompt: Sequence[int], logits: np.ndarray) -> None:
        self.came = [int(token) + (place % 3 == 2) for place, token in enumerate(logits.argmax(-1))]
        self.place, self.wants_drafts = 0, 0

    def draft(self, logits: Any, place: int = 0) -> int:
        return int(logits.argmax())

    def look_up(self, count: int) -> list[int]:
        return self.came[self.place : self.place + count]


class Eager(Guesser):
    """Wants drafts to the end and beyond."""

    wants_drafts = property(lambda self: 9, lambda self, wanted: None)  # type: ignore[assignment]


def decoded(passes: Any, guessers: Sequence[Guesser], prompts: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Greedy logits [count, B, V]."""
    counts = np.array([len(prompt) for prompt in prompts])
    tokens = np.array([[*prompt, *[0] * (counts.max() - len(prompt))] for prompt in prompts])
    found = []
    for number in range(count):
        found.append(passes.forward(tokens, counts))
        tokens, counts = found[-1].argmax(-1)[:, None], np.ones(len(prompts), np.int64)
        for guesser in guessers:
            guesser.place, guesser.wants_drafts = number + 1, count - 2 - number
    return np.stack(found)


@pytest.mark.parametrize("chained", [True, False])
def test_no_draft_passes_the_last_position(tmp_path: Path, chained: bool) -> None:
    """Whoever drafts, and however many."""
    session, ties = open_tiny(tmp_path, SMALL, calm_weights(SMALL)), Ties()
    gate = Routing(np.tile(np.float32(SCALING_PASS), (SMALL.blocks, 1)), is_gated=True)
    want = decoded(ExactPasses(session, [gate]), [], [[1, 2, 3]], 38)
    guesser = Eager([1, 2, 3], want[:, 0])
    got = decoded(DraftedPasses(session, [gate], [guesser], 9, chained=chained), [guesser], [[1, 2, 3]], 38)
    ties.compare(list(want[:, 0]), list(got[:, 0]), "to the end")
    assert session.lengths.tolist() == [40, 40]
    session.close()


# --- the number of steps --------------------------------------------------------------------------


def test_right_drafts_of_a_chain_cost_a_step_a_token(plain: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three scaling passes; then the main pass of three tokens beside the scaling pass of the last draft."""
    steps = seen_steps(plain, monkeypatch)
    found = complete(plain, PROMPTS, way("paired:3"))
    shapes = [rows.tokens.shape for rows in steps]
    # prefill; t, d1, d2; t..d2 beside d3; d4, d5 (d3's logits gave d4) ...; d9 beside d10; d10, which is the last fed
    assert shapes == [(4, 35), (4, 35), *[(4, 1)] * 3, (8, 3), *([(4, 1)] * 2 + [(8, 3)]) * 2, (8, 1), (4, 1)]
    assert [(each.timings.drafts, each.timings.accepted) for each in found] == [(10, 10)] * 4
    assert {(each.timings.steps, each.timings.exact_steps) for each in found} == {(len(steps), 24)}


def test_right_lookups_cost_two_steps_for_all_their_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
    foresee(monkeypatch, texts)
    steps = seen_steps(model, monkeypatch)
    found = complete(model, PROMPTS, way("lookup:4"))
    assert [each.token_ids for each in found] == texts
    # prefill gives the first token; then five a round; the last one is never fed
    assert [rows.tokens.shape for rows in steps] == [(4, 35)] * 2 + [(4, 5)] * 4 + [(4, 1)] * 2
    assert [(each.timings.drafts, each.timings.accepted) for each in found] == [(8, 8)] * 4
    assert {(each.timings.steps, each.timings.exact_steps) for each in found} == {(8, 24)}


def test_wrong_lookups_cost_no_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    never = next(iter(set(range(300)) - {t for each in complete(model, PROMPTS, EXACT) for t in each.token_ids}))
    monkeypatch.setattr("runtime.request.looked_up", lambda text, count: [never] * count)
    found = complete(model, PROMPTS, way("lookup:4"))
    assert [(each.timings.steps, each.timings.accepted) for each in found] == [(24, 0)] * 4


def test_what_follows_a_wrong_draft_is_not_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """All drafts but the fourth token are right; those after it were computed after another token."""
    texts = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
    foresee(monkeypatch, texts, wrong=3)
    ties = Ties()
    found = compare(model, PROMPTS, EXACT, "lookup:8", ties)
    ties.check()
    #                                 tokens 1 to 8 are drafted: 1 and 2 come; then 4 to 10, which come, are looked up
    assert [(each.timings.drafts, each.timings.accepted) for each in found] == [(8 + 7, 2 + 7)] * 4


def test_drafts_after_a_wrong_one_are_forgotten(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was a guess of what follows the one before it."""
    monkeypatch.setattr("runtime.request.looked_up", lambda text, count: [5, 6])
    [request], _ = prepare(model, [[1]], way("lookup"))
    for came, accepted in (([7, 6], 0), ([5, 6], 2), ([5, 7, 6], 3)):
        request.look_up(2)
        for token in came:
            request.accept(np.eye(300, dtype=np.float32)[token], 0.0)
        assert request._accepted == accepted


def test_rows_whose_drafts_came_true_ride_along(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row has drafts, the other none: the first one computes nothing while its drafts last."""
    texts = [each.token_ids for each in complete(model, PROMPTS[:2], EXACT)]
    foresee(monkeypatch, [texts[0], ()])
    steps = seen_steps(model, monkeypatch)
    found = complete(model, PROMPTS[:2], way("lookup:10"))
    assert [each.token_ids for each in found] == texts
    counts = [rows.counts.tolist() for rows in steps[2:]]
    assert counts == [[11, 1]] * 2 + [[0, 1]] * 20


def test_nothing_is_drafted_for_a_prompt_of_one_token(plain: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was just begun has no token yet that could be drafted after."""
    steps = seen_steps(plain, monkeypatch)
    for decode in ("paired:3", "lookup:3"):
        steps.clear()
        complete(plain, [[7]], way(decode))
        assert [(rows.tokens.shape, rows.logit_index.shape[1]) for rows in steps[:2]] == [((1, 1), 0), ((1, 1), 1)]


def test_rows_that_need_no_gate_take_a_step_a_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = seen_steps(model, monkeypatch)
    complete(model, [Routed(prompt, "math") for prompt in PROMPTS], way("lookup"))
    assert [rows.tokens.shape for rows in steps] == [(4, 35), *[(4, 1)] * 11]


# --- sessions that take little --------------------------------------------------------------------


@pytest.mark.parametrize("limits", [StepLimits(200, rows=1), StepLimits(200, decode_rows=1), StepLimits(200, tokens=3)])
@pytest.mark.parametrize("decode", ["paired:5", "lookup:5"])
def test_sessions_that_take_little_give_the_same(
    model: Model, limits: StepLimits, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
    foresee(monkeypatch, texts)
    steps = seen_steps(model, monkeypatch)
    monkeypatch.setattr(model.session, "limits", limits)
    assert [each.token_ids for each in complete(model, PROMPTS, way(decode))] == texts
    wide, narrow = ([rows for rows in steps if (rows.tokens.shape[1] > 1) is is_wide] for is_wide in (True, False))
    assert all(len(rows.counts) <= limits.rows for rows in wide)
    assert all(len(rows.counts) <= limits.decode_rows for rows in narrow)
    assert max(rows.tokens.shape[1] for rows in steps) <= limits.tokens
    assert max(rows.logit_index.shape[1] for rows in steps) > 1


@pytest.mark.parametrize("limits", [StepLimits(200, logits=1), StepLimits(200, tokens=1)])
@pytest.mark.parametrize("decode", ["paired:2", "lookup:2"])
def test_sessions_that_cannot_verify_are_refused(
    model: Model, limits: StepLimits, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As engines that give logits at one position of a row."""
    monkeypatch.setattr(model.session, "limits", limits)
    with pytest.raises(InputError, match=r"tells what follows each; got .* need at least 2 of both"):
        complete(model, PROMPTS, way(decode))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["paired:3", "lookup:3"])
def test_drafts_with_bad_numbers_are_dropped(tmp_path: Path, decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token never comes, so nobody may hear of it: `exact` would not."""
    never = 299
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    weights["embed"][never] = np.nan
    with load(tiny_bundle(tmp_path / "b", weights=weights, end=()), threads=1) as model:
        want = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
        assert not any(never in each for each in want)
        draft_anything(monkeypatch, lambda: never)
        monkeypatch.setattr("runtime.request.looked_up", lambda text, count: [want[0][5], never][:count])
        assert [each.token_ids for each in complete(model, PROMPTS, way(decode))] == want


@pytest.mark.parametrize("decode", ["paired:3", "lookup:3"])
def test_bad_numbers_of_a_token_that_comes_name_its_prompt(tmp_path: Path, decode: str) -> None:
    with load(tiny_bundle(tmp_path / "good", weights=WEIGHTS, end=()), threads=1) as model:
        good = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
    others = {*b"hello", *(token for each in (*good[:2], good[3]) for token in each)}
    place, bad = next((n, t) for n, t in enumerate(good[2]) if t not in others and t not in good[2][:n])
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    weights["embed"][bad] = np.nan
    variants = ["math", "xlora", "xlora", "xlora"]
    prompts = [Routed(*each) for each in zip([PROMPTS[0], *PROMPTS[:3]], variants, strict=True)]
    events = []
    with (
        load(tiny_bundle(tmp_path / "bad", weights=weights, end=()), threads=1) as model,
        pytest.raises(NumericError, match="is not finite for prompt 4 of the step"),
    ):
        events.extend(generate(model, prompts, way(decode)))  # keeps what came before the error
    assert [event.token_id for event in events if event.prompt == 3] == list(good[2][: place + 1])


@pytest.mark.parametrize("chained", [True, False])
def test_a_call_that_failed_can_be_repeated(tmp_path: Path, chained: bool) -> None:
    """Wherever a step fails: either nobody hears of it, or the same call then gives what it would have given."""
    open_tiny(tmp_path, SMALL, tiny_weights(SMALL)).close()
    settings = SessionSettings(SMALL.max_positions, threads=1)
    gate, code = (
        Routing(np.tile(np.float32(row), (SMALL.blocks, 1)), is_gated=gated)
        for row, gated in ((SCALING_PASS, True), ((0, 1, 0), False))
    )
    prompts, heard = [[1, 2, 3, 4], [9], [5, 6, 7]], 0
    exact = OrtSession(tmp_path / "dynamic.onnx", SMALL.signature, settings)
    want = decoded(ExactPasses(exact, [code, gate, gate]), [], prompts, 10)
    for fails in range(1, 20):
        session = Failing(tmp_path / "dynamic.onnx", SMALL.signature, settings)
        session.fails = fails
        guessers = [Guesser(prompt, want[:, row]) for row, prompt in enumerate(prompts)]
        passes = Repeated(DraftedPasses(session, [code, gate, gate], guessers, 3, chained=chained))
        got = decoded(passes, guessers, prompts, 10)
        np.testing.assert_allclose(got, want, atol=2e-3)
        np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
        assert passes.failed in ([], [(0,)], [(2,)])  # as the caller numbers them: constants come last in a step
        heard += len(passes.failed)
        session.close()
    assert 2 <= heard < 19
    exact.close()


class Repeated:
    """A caller that tries once more."""

    def __init__(self, passes: DraftedPasses) -> None:
        self.passes, self.failed = passes, []  # type: ignore[var-annotated]

    def forward(self, *call: Any) -> np.ndarray:
        try:
            return self.passes.forward(*call)
        except NumericError as error:
            self.failed.append(error.rows)
            lengths = self.passes._session.lengths  # of two gated rows in the scaling pass, then in the main pass
            assert lengths[:2].tolist() == lengths[2:4].tolist(), "no draft is left"
            return self.passes.forward(*call)


# --- what is looked up ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ([], []),
        ([1], []),
        ([1, 2, 3], []),
        ([1, 1], [1, 1, 1, 1]),
        ([1, 2, 3, 1], [2, 3, 1, 2]),  # a copy goes on through itself
        ([1, 2, 3, 9, 2, 3], [9, 2, 3, 9]),
        ([1, 2, 7, 1, 2, 8, 0, 1, 2], [8, 0, 1, 2]),  # the latest place
        ([5, 1, 2, 7, 2, 8, 9, 1, 2], [7, 2, 8, 9]),  # the longest end: 1 2, though 2 alone came later
        ([1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 0, 1, 3, 4, 8, 2, 3, 4], [6, 0, 1, 3]),
    ],
)
def test_what_followed_the_end_of_a_text_when_it_came_before(text: list[int], found: list[int]) -> None:
    assert looked_up(text, 4) == found
    assert looked_up(text, 2) == found[:2]


def test_requests_look_up_their_prompt_and_what_came(plain: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr("runtime.request.looked_up", lambda text, count: seen.append([*text]) or [])
    [found] = complete(plain, [[7, 8]], dataclasses.replace(way("lookup:3"), max_new_tokens=4))
    assert seen == [[7, 8, *found.token_ids[:count]] for count in (1, 2)]
