"""Paired decoding on tiny models: the tokens of exact decoding, in fewer steps, whatever is drafted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import GenerateOptions, Model, NumericError, Routed, complete, load
from runtime.backends.null import NullSession
from runtime.backends.ort import OrtSession
from runtime.decode import Decode, DecodeMode
from runtime.generate import generate, prepare
from runtime.ladder import open_ladder
from runtime.paired import Ahead, PairedPasses
from runtime.passes import ExactPasses, Passes, Routing
from runtime.request import Request
from runtime.rows import Rows
from runtime.session import SessionSettings, StepLimits
from runtime.signature import CacheStyle
from runtime.stacks import Stack
from tests.runtime import fake_tensorrt
from tests.runtime.compared_decoding import Failing, compare, draft_anything, random_prompts
from tests.runtime.tiny_bundles import BYTE_SHAPE, SCALING_PASS, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, open_tiny, tiny_weights
from tests.same_tokens import Ties

WEIGHTS = tiny_weights(BYTE_SHAPE)
SMALL = TinyShape(vocab=40, max_positions=40)
PROMPTS: list[str | Sequence[int]] = ["hello", [5, 17, 3], "日", "a longer prompt than the others, by far"]
EXACT, PAIRED, AUTO = (GenerateOptions(max_new_tokens=12, decode=decode) for decode in ("exact", "paired", "auto"))
WAYS = ("paired", "auto")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with load(tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", end=()), threads=1) as model:
        yield model


@dataclasses.dataclass
class Guesser:
    """Drafts the likeliest token."""

    wants_draft: bool = True
    drafts: int = 0
    is_sampled = False

    def draft(self, logits: Any) -> int:
        self.drafts += 1
        return int(logits.argmax())


# --- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [CacheStyle.APPEND, CacheStyle.ALIAS])
def test_a_thousand_prompts_get_the_tokens_of_exact(tmp_path: Path, cache: CacheStyle) -> None:
    """Random models, batches, lengths and stop tokens; half of them in `auto`."""
    random, ties, compared, drafts, accepted = np.random.default_rng(1), Ties(), 0, 0, 0
    for seed in range(4):
        shape = dataclasses.replace(SMALL, cache=cache)
        path = tiny_bundle(tmp_path / str(seed), shape, weights=tiny_weights(shape, seed), tokenizer=False, end=())
        with load(path, threads=1) as model:
            for _ in range(36):
                prompts = random_prompts(random, int(random.integers(1, 17)), shape.vocab)
                stop = tuple(random.integers(0, shape.vocab, 2).tolist())
                options = GenerateOptions(max_new_tokens=int(random.integers(2, 14)), stop_token_ids=stop)
                found = compare(model, prompts, options, WAYS[len(prompts) % 2], ties)
                compared += len(prompts)
                drafts += sum(each.timings.drafts for each in found)
                accepted += sum(each.timings.accepted for each in found)
    ties.check()
    assert compared > 1_000  # in each of the two styles
    assert 0.1 * drafts < accepted < 0.9 * drafts  # drafts came true, and others did not


@pytest.mark.parametrize("decode", WAYS)
@pytest.mark.parametrize("chunk", [512, 3])
def test_gated_rows_among_rows_of_constants(
    model: Model, decode: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged prompts in chunks, some of which end exactly at a border."""
    monkeypatch.setattr("runtime.routing.CHUNK", chunk)
    random, ties = np.random.default_rng(2), Ties()
    for _ in range(10):
        prompts = random_prompts(random, 6, 300, 12)
        variants = random.choice(["xlora", "math", "base"], 6)
        compare(model, [Routed(*each) for each in zip(prompts, variants, strict=True)], EXACT, decode, ties)
    ties.check()


@pytest.mark.parametrize("decode", WAYS)
def test_rows_that_end_at_different_times(model: Model, decode: str) -> None:
    ties = Ties()
    free = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
    for row in range(len(PROMPTS)):
        for place in (0, 1, 2, 5):
            compare(model, PROMPTS, dataclasses.replace(EXACT, stop_token_ids=(free[row][place],)), decode, ties)
    ties.check()


@pytest.mark.parametrize("decode", WAYS)
def test_rows_may_fill_all_positions(model: Model, decode: str) -> None:
    """Full rows ride along, and no draft passes the last position."""
    ties = Ties()
    found = compare(model, [[3] * 198, [4] * 190, [1], [2] * 200], GenerateOptions(), decode, ties)
    assert [len(each.token_ids) for each in found] == [3, 11, 128, 1]
    ties.check()


@pytest.mark.parametrize("decode", WAYS)
def test_it_does_not_matter_what_is_drafted(model: Model, decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random, ties = np.random.default_rng(3), Ties()
    common = sorted({token for each in complete(model, PROMPTS, EXACT) for token in each.token_ids})
    draft_anything(monkeypatch, lambda: int(random.choice(common)))
    for _ in range(10):
        compare(model, PROMPTS, EXACT, decode, ties)
    ties.check()


def test_a_wrong_draft_that_stays_in_the_cache_is_noticed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtSession, "truncate", lambda self, slot, length: None)
    with pytest.raises(AssertionError, match=r"another token at step|logits differ"):
        compare(model, PROMPTS, EXACT, "paired", Ties())


def test_the_gate_of_another_token_is_noticed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever token comes is taken for the drafted one."""
    monkeypatch.setattr("runtime.paired.Ahead", lambda token, *rest: Ahead(Anything(), *rest))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"another token at step|logits differ"):
        compare(model, PROMPTS, EXACT, "paired", Ties())


class Anything:
    """Equal to all."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


def decoded(passes: Passes, drafters: Sequence[Guesser], prompts: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Greedy logits [count, B, V]."""
    counts = np.array([len(prompt) for prompt in prompts])
    tokens = np.array([[*prompt, *[0] * (counts.max() - len(prompt))] for prompt in prompts])
    found = []
    for _ in range(count):
        found.append(passes.forward(tokens, counts))
        tokens, counts = found[-1].argmax(-1)[:, None], np.ones(len(prompts), np.int64)
        for drafter in drafters:
            drafter.wants_draft = True
    return np.stack(found)


@pytest.mark.parametrize("cache", [CacheStyle.APPEND, CacheStyle.ALIAS])
def test_the_other_backend_gives_the_same(cache: CacheStyle, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's session, on the fake GPU: captured graphs, slots that are cut, two widths of batch."""
    fake_tensorrt.install(monkeypatch)
    shape = dataclasses.replace(SMALL, cache=cache)
    session, ties = fake_tensorrt.open_fake(shape, tiny_weights(shape)), Ties()
    gate = Routing(np.tile(np.float32(SCALING_PASS), (shape.blocks, 1)), is_gated=True)
    code = Routing(np.tile(np.float32((0, 1, 0)), (shape.blocks, 1)))
    for routings in ([gate], [code, gate]):
        prompts = [[1, 2, 3], [4, 5]][: len(routings)]
        want = decoded(ExactPasses(session, routings), [], prompts, 12)
        drafters = [Guesser(wants_draft=False) for _ in prompts]
        paired = PairedPasses(session, routings, drafters)
        assert (session.limits.rows, session.limits.decode_rows) == (6, 12)
        got = decoded(paired, drafters, prompts, 12)
        for row in range(len(prompts)):
            ties.compare(list(want[:, row]), list(got[:, row]), f"row {row}")
        assert 0 < sum(drafter.drafts for drafter in drafters) == 11
    ties.check()
    session.close()


def one_row(tmp_path: Path) -> tuple[OrtSession, Routing]:
    gate = Routing(np.tile(np.float32(SCALING_PASS), (SMALL.blocks, 1)), is_gated=True)
    return open_tiny(tmp_path, SMALL, tiny_weights(SMALL)), gate


def test_no_draft_passes_the_last_position(tmp_path: Path) -> None:
    """Whoever drafts, and however long."""
    session, gate = one_row(tmp_path)
    want = decoded(ExactPasses(session, [gate]), [], [[1, 2, 3]], 38)
    drafter = Guesser()
    got = decoded(PairedPasses(session, [gate], [drafter]), [drafter], [[1, 2, 3]], 38)
    ties = Ties()
    ties.compare(list(want[:, 0]), list(got[:, 0]), "to the end")
    assert session.lengths.tolist() == [40, 40]
    assert drafter.drafts == 37
    session.close()


def test_several_tokens_may_follow_a_draft(tmp_path: Path) -> None:
    """The first of them is the drafted one: the others have no gate yet."""
    session, gate = one_row(tmp_path)
    calls = [(np.array([[1, 2, 3]]), np.array([3])), (np.array([[4]]), np.array([1]))]
    passes = PairedPasses(session, [gate], [Guesser()])
    for call in calls:
        passes.forward(*call)
    drafted = passes._ahead[0]
    assert drafted is not None
    calls.append((np.array([[drafted.token, 5, 6]]), np.array([3])))
    got = passes.forward(*calls[-1])
    exact = ExactPasses(session, [gate])
    want = [exact.forward(*call) for call in calls][-1]
    np.testing.assert_allclose(got, want, atol=1e-4)
    session.close()


# --- the number of steps --------------------------------------------------------------------------


def test_a_right_draft_saves_the_scaling_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of zeros: the scaling pass computes what the main pass does, so every draft comes true."""
    weights = {name: array * (not name.startswith("expert")) for name, array in WEIGHTS.items()}
    with load(tiny_bundle(tmp_path / "b", weights=weights, end=()), threads=1) as model:
        steps: list[Rows] = []
        step = model.session.step
        monkeypatch.setattr(model.session, "step", lambda rows: steps.append(rows) or step(rows))
        found = complete(model, PROMPTS, PAIRED)
    assert [(each.timings.drafts, each.timings.accepted) for each in found] == [(10, 10)] * 4
    # prefill, the first token's scaling pass, then a step a token; the last token is not drafted
    assert [len(rows.counts) for rows in steps] == [4, 4, 4, *[8] * 10, 4]
    assert [rows.logit_index.shape[1] for rows in steps] == [0, 1, 1, *[1] * 10, 1]


def test_wrong_drafts_cost_the_scaling_pass(model: Model, steps: list[Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    never = next(iter(set(range(300)) - {t for each in complete(model, PROMPTS, EXACT) for t in each.token_ids}))
    draft_anything(monkeypatch, lambda: never)
    steps.clear()
    found = complete(model, PROMPTS, PAIRED)
    assert [(each.timings.drafts, each.timings.accepted) for each in found] == [(10, 0)] * 4
    assert [len(rows.counts) for rows in steps] == [4, 4, *[4, 8] * 10, 4, 4]  # `paired` never gives up


def test_only_rows_without_a_right_draft_catch_up(model: Model, steps: list[Rows]) -> None:
    found = complete(model, PROMPTS, PAIRED)
    caught_up = sum(int(rows.counts.sum()) for rows in steps[2:] if rows.slots == slice(0, 4) and len(rows.counts) == 4)
    assert 0 < sum(each.timings.accepted for each in found) < 40
    assert caught_up == 4 * 11 - sum(each.timings.accepted for each in found)


def test_rows_that_need_no_gate_are_not_paired(model: Model, steps: list[Rows]) -> None:
    complete(model, [Routed(prompt, "math") for prompt in PROMPTS], PAIRED)
    assert [len(rows.counts) for rows in steps] == [4] * 12


def test_constants_beside_a_gated_row_that_ended_run_alone(model: Model, steps: list[Rows]) -> None:
    [gated, other] = [Routed(PROMPTS[0], "xlora"), Routed(PROMPTS[1], "math")]
    [free] = complete(model, [gated], PAIRED)
    steps.clear()
    stop = dataclasses.replace(PAIRED, stop_token_ids=(free.token_ids[3],))
    [ended, on] = complete(model, [gated, other], stop)
    assert len(ended.token_ids) <= 4
    left = len(on.token_ids) - len(ended.token_ids)
    assert left > 0
    assert [len(rows.counts) for rows in steps[-left:]] == [2] * left


@pytest.mark.parametrize("decode", ["paired", "auto", "frozen"])
def test_routed_rows_have_one_pass_already(tmp_path: Path, decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataclasses.replace(BYTE_SHAPE, gate=False, router=True)
    with load(tiny_bundle(tmp_path / "b", shape, end=()), threads=1) as model:
        steps: list[Rows] = []
        step = model.session.step
        monkeypatch.setattr(model.session, "step", lambda rows: steps.append(rows) or step(rows))
        want = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
        assert [each.token_ids for each in complete(model, PROMPTS, dataclasses.replace(EXACT, decode=decode))] == want
    assert len(steps) == 24


@pytest.mark.parametrize("decode", ["paired", "auto", "frozen"])
@pytest.mark.parametrize("per_length", [False, True])
def test_without_caches_every_way_is_exact(tmp_path: Path, decode: str, per_length: bool) -> None:
    shape = dataclasses.replace(BYTE_SHAPE, cache=CacheStyle.NONE)
    with load(tiny_bundle(tmp_path / "b", shape, weights=WEIGHTS, per_length=per_length, end=()), threads=1) as model:
        want = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
        options = dataclasses.replace(EXACT, decode=decode, measure_frozen=True)
        found = complete(model, PROMPTS, options)
    assert [each.token_ids for each in found] == want
    assert all((each.timings.drafts, each.divergence) == (0, None) for each in found)


# --- sessions that take few rows ------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "sizes"), [(4, {2, 4}), (5, {2, 4}), (1, {1})])
def test_batches_leave_room_for_both_passes(
    model: Model, steps: list[Rows], rows: int, sizes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
    steps.clear()
    monkeypatch.setattr(model.session, "limits", StepLimits(positions=200, decode_rows=rows))
    found = complete(model, PROMPTS, PAIRED)
    assert [each.token_ids for each in found] == want
    assert {len(step.counts) for step in steps} == sizes
    assert [each.timings.drafts for each in found] == [10 if rows > 1 else 0] * 4


def test_auto_keeps_full_batches_where_both_passes_do_not_fit(
    model: Model, steps: list[Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.session, "limits", StepLimits(positions=200, rows=4, decode_rows=4))
    complete(model, PROMPTS, AUTO)
    assert [len(step.counts) for step in steps] == [4] * 24


# --- errors ---------------------------------------------------------------------------------------


def test_a_draft_with_bad_numbers_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token never comes, so nobody may hear of it: `exact` would not."""
    never = 299
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    weights["embed"][never] = np.nan
    with load(tiny_bundle(tmp_path / "b", weights=weights, end=()), threads=1) as model:
        want = [each.token_ids for each in complete(model, PROMPTS, EXACT)]
        assert not any(never in each for each in want)
        random = np.random.default_rng(4)
        draft_anything(monkeypatch, lambda: int(random.choice([never, want[0][5]])))
        assert [each.token_ids for each in complete(model, PROMPTS, PAIRED)] == want
        draft_anything(monkeypatch, lambda: never)
        assert [each.token_ids for each in complete(model, PROMPTS, PAIRED)] == want


def test_only_the_draft_with_bad_numbers_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others run, and, experts being zeros, come true: their rows need no scaling pass."""
    never = 299
    weights = {name: array * (not name.startswith("expert")) for name, array in WEIGHTS.items()}
    weights["embed"] = weights["embed"].copy()
    weights["embed"][never] = np.nan
    draft = Request.draft

    def drafted(self: Request, logits: Any, place: int = 0) -> int:
        return draft(self, np.eye(len(logits), dtype=np.float32)[never] if self.number == 1 else logits, place)

    monkeypatch.setattr(Request, "draft", drafted)
    with load(tiny_bundle(tmp_path / "b", weights=weights, end=()), threads=1) as model:
        steps: list[Rows] = []
        step = model.session.step
        monkeypatch.setattr(model.session, "step", lambda rows: steps.append(rows) or step(rows))
        found = complete(model, PROMPTS, PAIRED)
    assert [each.timings.accepted for each in found] == [10, 0, 10, 10]
    caught_up = [rows.counts.tolist() for rows in steps[3:] if rows.slots == slice(0, 4)]
    assert caught_up == [[0, 1, 0, 0]] * 10


def test_a_prompt_of_one_token_is_not_drafted_after(model: Model, steps: list[Rows]) -> None:
    """It looks like a token that came; but nothing did, so a draft would be of the first new token."""
    [found] = complete(model, [[7]], PAIRED)
    assert found.timings.drafts == 10
    assert [(len(rows.counts), rows.logit_index.shape[1]) for rows in steps[:3]] == [(1, 0), (1, 1), (1, 1)]


@pytest.mark.parametrize("decode", WAYS)
def test_a_request_with_no_token_yet_wants_no_draft(model: Model, decode: str) -> None:
    [request], events = prepare(model, [[7]], dataclasses.replace(EXACT, decode=decode))
    assert (request.wants_draft, request.wants_drafts) == (False, 0)
    wanted = [request.wants_drafts for _ in events]
    assert wanted == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0]


def test_bad_numbers_of_a_token_that_comes_name_its_prompt(tmp_path: Path) -> None:
    with load(tiny_bundle(tmp_path / "good", end=()), threads=1) as model:
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
        events.extend(generate(model, prompts, PAIRED))  # keeps what came before the error
    assert [event.token_id for event in events if event.prompt == 3] == list(good[2][: place + 1])


@pytest.mark.parametrize("fails", [*range(1, 12)])
def test_a_call_that_failed_can_be_repeated(tmp_path: Path, fails: int) -> None:
    """Wherever a step fails, the same call then gives what it would have given."""
    shape = SMALL
    open_tiny(tmp_path, shape, tiny_weights(shape)).close()
    settings = SessionSettings(shape.max_positions, threads=1)
    gate, code = (
        Routing(np.tile(np.float32(row), (shape.blocks, 1)), is_gated=gated)
        for row, gated in ((SCALING_PASS, True), ((0, 1, 0), False))
    )
    random = np.random.default_rng(6)
    calls = [(random.integers(0, 40, (3, 4)), np.array([4, 1, 3]))]
    calls += [(random.integers(0, 40, (3, 1)), np.array(counts)) for counts in ([1, 1, 1],) * 3 + ([1, 0, 1],) * 2]
    exact = OrtSession(tmp_path / "dynamic.onnx", shape.signature, settings)
    exact_passes = ExactPasses(exact, [code, gate, gate])
    want = [exact_passes.forward(*call) for call in calls]
    session = Failing(tmp_path / "dynamic.onnx", shape.signature, settings)
    session.fails = fails
    passes, got, failed = PairedPasses(session, [code, gate, gate], [Guesser(), Guesser(), Guesser()]), [], []
    for call in calls:
        try:
            got.append(passes.forward(*call))
        except NumericError as error:
            failed.append(error.rows)
            got.append(passes.forward(*call))
    assert failed in ([(0,)], [(2,)])  # as the caller numbers them: the row of constants comes last in a step
    for (_, counts), a, b in zip(calls, want, got, strict=True):
        np.testing.assert_allclose(a[counts > 0], b[counts > 0], atol=1e-4)
    exact.close()
    session.close()


def test_adapters_reach_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a batch read the same stack, in every way of decoding."""
    given: list[tuple[int, Stack | None]] = []
    monkeypatch.setattr("runtime.ladder.adapter_inputs", lambda signature: (1,))
    monkeypatch.setattr("runtime.routing.adapter_inputs", lambda signature: (1,))
    session = NullSession(Path(), SMALL.signature, SessionSettings(20))
    monkeypatch.setattr(session, "allocate", lambda slots, adapters=None: given.append((slots, adapters)))
    stack: Any = object()
    routing = Routing(np.zeros((2, 3), np.float32), is_gated=True)
    request: Any = type("Asked", (), {"prompt": (1,), "is_sampled": False})
    for mode in DecodeMode:
        open_ladder(session, [routing] * 2, [request] * 2, Decode(mode), stack)
    assert given == [(4, stack)] * len(DecodeMode)
