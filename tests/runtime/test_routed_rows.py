"""Graphs with a router inside their sites: which rows it routes, in which sessions, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import GenerateOptions, InputError, Model, Routed, complete, load
from runtime.backends.null import NullSession
from runtime.bundle import read_manifest
from runtime.compare import judge
from runtime.golden import GoldenCase, GoldenLimits, case_from_replay, replay_golden
from runtime.inspect import render
from runtime.manifest import GraphInfo, Manifest, Mode, VariantInfo, VariantKind
from runtime.recording import (
    FORMAT_VERSION,
    RecordedCase,
    RecordedNoise,
    RecordedText,
    Recording,
    RecordingHeader,
    load_recording,
    save_recording,
)
from runtime.replay import Answer, GivenText, replay, replay_given
from runtime.routers import ArrowInfo, RankSelectInfo
from runtime.rows import Rows
from runtime.sealed_folder import manifest_bytes
from runtime.session import Session, SessionSettings
from runtime.signature import ROUTER, CacheStyle
from tests.runtime import fake_tensorrt
from tests.runtime.bundle_makers import artifacts_of, bundle_files, make_manifest
from tests.runtime.tiny_bundles import BYTE_SHAPE, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, open_tiny, reference, tiny_weights
from tests.same_tokens import Ties, greedy_ids, seen_logits

SHAPE = dataclasses.replace(BYTE_SHAPE, gate=False, router=True)
WEIGHTS = tiny_weights(SHAPE)
ROWS = {"base": [0, 0, 0], "math": [1, 0, 0], "lyrics": [0, 0, 1], "rank-select": [1, 1, 1]}
PROMPTS: list[list[int]] = [[5, 17, 3], [104, 101, 108, 108, 111], [7], list(range(40, 53))]
GREEDY = GenerateOptions(max_new_tokens=10)
TOLERANCE = 2e-5
Open = Callable[[TinyShape], Session]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("routed") / "tiny", SHAPE, weights=WEIGHTS, end=())


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with load(path, threads=1) as model:
        yield model


@pytest.fixture(params=["ort", "trt"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """A session of either backend on the tiny decoder."""
    made: list[Session] = []

    def make(shape: TinyShape) -> Session:
        if request.param == "ort":
            session: Session = open_tiny(tmp_path, shape, tiny_weights(shape))
        else:
            fake_tensorrt.install(monkeypatch)
            session = fake_tensorrt.open_fake(shape, tiny_weights(shape))
        made.append(session)
        return session

    yield make
    for session in made:
        session.close()


def expected(ids: Sequence[int], variant: str) -> np.ndarray:
    """Plain numpy over the whole sequence [S, V]."""
    scalings = np.tile(np.float32(ROWS[variant]), (len(ids), SHAPE.blocks, 1))
    return reference(SHAPE, WEIGHTS, ids, scalings, is_routed=variant == "rank-select")[0]


def greedy(prompt: Sequence[int], variant: str) -> list[np.ndarray]:
    ids, found = list(prompt), []
    for _ in range(10):
        found.append(expected(ids, variant)[-1])
        ids.append(int(found[-1].argmax()))
    return found


def test_the_router_changes_what_comes(model: Model) -> None:
    """It is neither the sum of the experts, nor any other variant; so rows that change places would show."""
    plain = reference(SHAPE, WEIGHTS, PROMPTS[3], np.ones((13, SHAPE.blocks, 3), np.float32))[0]
    for other in (plain, *(expected(PROMPTS[3], name) for name in ("base", "math", "lyrics"))):
        assert np.abs(expected(PROMPTS[3], "rank-select") - other).max() > 1e3 * TOLERANCE


@pytest.mark.parametrize("chunk", [512, 3])
def test_all_pairs_in_one_batch_are_as_alone(model: Model, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged prompts; routed rows and rows of constants in one step. Alone, each row's tokens are numpy's."""
    monkeypatch.setattr("runtime.routing.CHUNK", chunk)
    alone, ties = {}, Ties()
    for number, prompt in enumerate(PROMPTS):
        for name in ROWS:
            with seen_logits() as seen:
                complete(model, [Routed(prompt, name)], GREEDY)
            alone[number, name] = seen[0]
            assert greedy_ids(seen[0]) == greedy_ids(greedy(prompt, name))
    for pair in combinations_with_replacement(ROWS, 2):
        names = [*pair, *reversed(pair)]
        with seen_logits() as seen:
            complete(model, [Routed(*each) for each in zip(PROMPTS, names, strict=True)], GREEDY)
        for number, name in enumerate(names):
            ties.compare(alone[number, name], seen[number], f"{name} in {names}")
    ties.check()


def test_the_router_is_the_default_and_takes_one_pass(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Rows] = []
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda rows: steps.append(rows) or step(rows))
    prompts = [PROMPTS[0], Routed(PROMPTS[1], "math"), Routed(PROMPTS[2], mix={"math": 1.0})]
    with seen_logits() as seen:
        complete(model, prompts, GREEDY)
    assert [rows.router.tolist() for rows in steps if rows.router is not None] == [[1, 0, 0]] * 10
    for number, name in enumerate(("rank-select", "math", "math")):
        assert greedy_ids(seen[number]) == greedy_ids(greedy(PROMPTS[number], name))


def test_without_caches_too(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, cache=CacheStyle.NONE)
    with load(tiny_bundle(tmp_path / "b", shape, weights=WEIGHTS, end=()), threads=1) as model, seen_logits() as seen:
        complete(model, [Routed(PROMPTS[1], name) for name in ROWS], GREEDY)
    for number, name in enumerate(ROWS):
        assert greedy_ids(seen[number]) == greedy_ids(greedy(PROMPTS[1], name))


# --- sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", list(CacheStyle))
def test_a_session_routes_the_rows_that_are_switched_on(opened: Open, style: CacheStyle) -> None:
    """The switches change from step to step, and a captured graph reads the new ones."""
    shape = TinyShape(gate=False, router=True, cache=style)
    session, weights = opened(shape), tiny_weights(shape)
    ids = np.random.default_rng(3).integers(0, shape.vocab, (2, 8))
    scalings = np.random.default_rng(4).random((2, 8, shape.blocks, shape.experts), np.float32)
    if style is CacheStyle.NONE:
        ids, scalings = ids[:1], scalings[:1]
    session.allocate(len(ids))
    for switches in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
        session.reset()
        wanted = [
            reference(shape, weights, row, scale, is_routed=switch == 1)[0]
            for row, scale, switch in zip(ids, scalings, switches, strict=False)
        ]
        router = np.array(switches[: len(ids)], np.float32)
        width = 8 if style is CacheStyle.NONE else 1
        for at in range(0, 8, width):
            part = slice(at, at + width)
            index = np.tile(np.arange(width), (len(ids), 1))
            counts = np.full(len(ids), width)
            rows = Rows(ids[:, part], counts, slice(0, len(ids)), scalings[:, part], index, router)
            got = session.step(rows).logits
            for row, want in enumerate(wanted):
                np.testing.assert_allclose(got[row], want[part], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (None, "router switches do not fit this graph; got None; need 1 of 0 and 1"),
        (np.ones(2, np.float32), r"got \[1\.0, 1\.0\]; need 1 of 0 and 1"),
        (np.ones((1, 1), np.float32), r"got \[\[1\.0\]\]; need 1 of"),
        (np.float32([0.5]), r"got \[0\.5\]"),
        (np.float32([np.nan]), r"got \[nan\]"),
    ],
)
def test_switches_that_do_not_fit_are_refused(opened: Open, switches: Any, message: str) -> None:
    shape = TinyShape(gate=False, router=True)
    session = opened(shape)
    session.allocate(1)
    with pytest.raises(InputError, match=message):
        session.step(one_row(shape, switches))
    assert session.lengths.tolist() == [0]


def test_switches_for_a_graph_without_router_are_refused(opened: Open) -> None:
    session = opened(TinyShape())
    session.allocate(1)
    with pytest.raises(InputError, match=r"got \[0\.0\]; need None: it has no router"):
        session.step(one_row(TinyShape(), np.zeros(1, np.float32)))


def test_the_null_backend_asks_for_them_as_well() -> None:
    shape = TinyShape(gate=False, router=True)
    session = NullSession(Path("none"), shape.signature, SessionSettings(10))
    session.allocate(1)
    with pytest.raises(InputError, match="router switches"):
        session.step(one_row(shape, None))
    assert session.step(one_row(shape, np.ones(1, np.float32))).gate is None


def one_row(shape: TinyShape, switches: Any) -> Rows:
    scalings = np.ones((1, 2, shape.blocks, shape.experts), np.float32)
    return Rows(np.ones((1, 2), np.int64), np.array([2]), slice(0, 1), scalings, np.array([[1]]), switches)


# --- replays that are held to a recorded answer --------------------------------------------------

LIMITS = GoldenLimits(logits=1e-3, gate=1e-4)


def routed_case(session: Session, **changes: Any) -> GoldenCase:
    row = np.ones((SHAPE.blocks, SHAPE.experts), np.float32)
    [run] = replay(session, [PROMPTS[3]], 6, row, is_gated=False, is_routed=True)
    case = case_from_replay("dynamic", row, run, LIMITS, is_routed=True)
    return case.model_copy(update=changes)


def test_golden_cases_of_the_router_are_replayed_under_it(model: Model) -> None:
    case = routed_case(model.session)
    assert all(check.passed for check in replay_golden(model.session, [case], "float32"))
    unrouted = case.model_copy(update={"is_routed": False})
    assert not all(check.passed for check in replay_golden(model.session, [unrouted], "float32"))


def test_only_a_tie_of_the_router_excuses_another_answer(model: Model) -> None:
    """At position 7 the recorded answer is another: right if the router had a tie there, wrong if anywhere else."""
    case = routed_case(model.session)
    sums = list(case.logsumexp)
    sums[7] += 0.5
    other = case.model_copy(update={"logsumexp": tuple(sums)})
    for ties, passes in (((7,), True), ((3, 7, 9), True), ((), False), ((3,), False), ((8,), False)):
        check = replay_golden(model.session, [other.model_copy(update={"ties": ties})], "float32")[0]
        assert check.passed == passes, ties
    sums[2] += 0.5  # before any tie
    early = case.model_copy(update={"logsumexp": tuple(sums), "ties": (7,)})
    assert not replay_golden(model.session, [early], "float32")[0].passed


def recording_of(model: Model, ties: tuple[int, ...] = (), dtype: str = "float32") -> Recording:
    texts = [GivenText(5, tuple(range(40, 53))), GivenText(6, tuple(range(60, 74)))]
    row = np.ones((SHAPE.blocks, SHAPE.experts), np.float32)
    answers = replay_given(model.session, texts, row, is_gated=False, is_routed=True)
    case = RecordedCase(
        name="rank-select", row=tuple(map(tuple, row.tolist())), is_gated=False, is_routed=True,
        noise=RecordedNoise(), adapters_matter=9.0,
        texts=tuple(RecordedText(prompt=text.prompt, tokens=text.tokens, ties=ties) for text in texts),
    )  # fmt: skip
    header = RecordingHeader(
        format_version=FORMAT_VERSION, dtype=dtype, mode=Mode.DYNAMIC, mix=None, router=RankSelectInfo(keep=0.5),
        experts=("math",), vocab_size=300, gate=None, sources=(), bundle="0" * 64, versions={}, cases=(case,),
    )  # fmt: skip
    return Recording(header, (tuple(answers),))


def test_a_recording_of_the_router_is_compared_under_it(model: Model, tmp_path: Path) -> None:
    from runtime.compare import compare

    save_recording(recording_of(model), tmp_path / "r.npz")
    recording = load_recording(tmp_path / "r.npz")
    assert recording.header.cases[0].is_routed
    found = compare(model.session, recording)
    assert found.passed
    assert [check.name for check in found.checks][-1] == "router_ties"
    case = recording.header.cases[0].model_copy(update={"is_routed": False})
    unrouted = Recording(recording.header.model_copy(update={"cases": (case,)}), recording.answers)
    assert not compare(model.session, unrouted).passed


@pytest.mark.parametrize(("ties", "passes"), [((8,), True), ((1, 8), True), ((), False), ((7,), False), ((9,), False)])
def test_a_comparison_ends_where_the_router_had_a_tie(model: Model, ties: tuple[int, ...], passes: bool) -> None:
    """Another answer from token 8 on, the fourth after the prompt."""
    recording = recording_of(model, ties)
    [right] = recording.answers
    text = GivenText(5, tuple(range(40, 53)))
    changed = right[0].logits.copy()
    changed[text.positions >= 8] += np.random.default_rng(0).normal(size=changed.shape[1]).astype(np.float32)
    found = judge(recording, [(Answer(changed, None), right[1])], is_cpu=True)
    assert found.passed == passes
    ties_check = next(check for check in found.checks if check.name == "router_ties")
    assert (ties_check.value > 0) == any(tie in (8, 9) for tie in ties)


def test_too_many_ties_prove_nothing(model: Model) -> None:
    recording = recording_of(model, ties=(0,))
    [right] = recording.answers
    wrong = [tuple(Answer(answer.logits + 1.0 * (np.arange(300) % 7), None) for answer in right)]
    found = judge(recording, wrong, is_cpu=True)
    assert [check.name for check in found.checks if not check.passed] == ["router_ties"]


def test_a_routed_case_needs_a_router(model: Model, tmp_path: Path) -> None:
    recording = recording_of(model)
    header = recording.header.model_copy(update={"router": None})
    save_recording(Recording(header, recording.answers), tmp_path / "r.npz")
    with pytest.raises(InputError, match="routed, of a graph without a router"):
        load_recording(tmp_path / "r.npz")


# --- what a manifest says ------------------------------------------------------------------------


def test_inspect_tells_of_the_router(path: Path) -> None:
    from runtime.bundle import open_bundle

    shown = render(open_bundle(path))
    assert "router rank-select, keep 0.5" in shown
    assert "  rank-select  the router inside the sites, token by token and site by site, in one pass; the default" in (
        shown.splitlines()
    )


ROUTER_VARIANT = VariantInfo(name="arrow", kind=VariantKind.ROUTER, graph="dynamic", mix=None)
ARROW = ArrowInfo(top_k=2, temperature=1.0, seed=0)


def routed_manifest(graph: dict[str, Any], **changes: Any) -> Manifest:
    """The toy manifest with a router in its dynamic graph."""
    toy = make_manifest()
    signature = TinyShape(gate=False, router=True).signature
    dynamic = toy.graphs[0].model_copy(update={"signature": signature, "router": ARROW} | graph)
    fields = {"graphs": (dynamic, *toy.graphs[1:]), "gate": None, "variants": (ROUTER_VARIANT,)} | changes
    return make_manifest(artifacts_of(bundle_files()), **fields)


def test_a_manifest_with_a_router_is_read_as_it_was_written() -> None:
    manifest = routed_manifest({})
    again = read_manifest(manifest_bytes(manifest))
    assert again == manifest
    assert again.graphs[0].router == ARROW


@pytest.mark.parametrize(
    ("graph", "changes", "message"),
    [
        ({"router": None}, {"variants": ()}, "exactly the graphs with a router take the input router"),
        ({"signature": TinyShape(gate=False).signature}, {}, "exactly the graphs with a router take the input router"),
        ({"signature": TinyShape(router=True).signature}, {}, "takes scalings and has no gate"),
        ({"router": ARROW.model_copy(update={"top_k": 3})}, {}, "its router picks 3 experts, there are 2"),
        ({"router": ARROW.model_copy(update={"general": ("code",)})}, {}, "names experts as general adapters"),
        ({"router": RankSelectInfo(keep=0.5)}, {}, r"variants\.arrow: its graph has no router of this name"),
        (
            {"router": None, "signature": TinyShape(gate=False).signature},
            {},
            r"variants\.arrow: its graph has no router of this name",
        ),
    ],
)
def test_routers_that_contradict_their_manifest_are_refused(
    graph: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_manifest(manifest_bytes(routed_manifest(graph, **changes)))


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "arrow", "top_k": 0, "temperature": 1.0, "seed": 0},
        {"kind": "arrow", "top_k": 2, "temperature": 0.0, "seed": 0},
        {"kind": "arrow", "top_k": 2, "temperature": 1.0, "seed": 0, "keep": 0.5},
        {"kind": "rank-select", "keep": 0.0},
        {"kind": "rank-select"},
        {"kind": "lily"},
        {},
    ],
)
def test_settings_no_router_has_are_refused(router: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="router"):
        GraphInfo.model_validate(make_manifest().graphs[0].model_dump() | {"router": router})


def test_the_signature_lists_the_switches_after_the_scalings() -> None:
    names = [spec.name for spec in SHAPE.signature.inputs]
    assert names[names.index("scalings") + 1] == ROUTER
    spec = SHAPE.signature.input(ROUTER)
    assert spec is not None
    assert (spec.dtype, spec.shape) == ("float32", ("B",))
