"""Places of slots: always in a row, with few moves that overwrite nothing; a view of some of them as a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.backends.null import NullSession
from runtime.backends.ort import OrtSession
from runtime.errors import InputError, NumericError
from runtime.rows import Rows
from runtime.session import SessionSettings, StepLimits
from runtime.slot_plan import plan_places
from runtime.slot_pool import Claim, SlotPool
from runtime.slot_view import SlotView
from tests.runtime.test_ort_session import SHAPE, TOLERANCE, ids_for, scalings_for
from tests.runtime.tiny_graphs import open_tiny, reference, tiny_weights


def test_places_stay_in_segments_and_moves_overwrite_nothing() -> None:
    """Random keys that come, go, and find their border elsewhere."""
    random = np.random.default_rng(1)
    held: dict[int, int] = {}
    segments: list[list[int]] = [[], [], []]
    most = 0
    for key in range(3_000):
        for segment in segments:
            segment[:] = [each for each in segment if random.random() > 0.1]
        if sum(map(len, segments)) < 20:
            segments[int(random.integers(3))].append(key)
        held = {key: place for key, place in held.items() if any(key in segment for segment in segments)}
        start = int(random.integers(0, 8))
        plan = plan_places(held, segments, start)
        slots = dict.fromkeys(range(40)) | {place: key for key, place in held.items()}
        for source, target in plan.moves:
            assert slots[target] is None, "what is there would be lost"
            slots[target], slots[source] = slots[source], None
        for key_, place in plan.places.items():
            assert slots[place] == key_ or (slots[place] is None and key_ not in held)
        for segment in segments:
            assert sorted(plan.places[key] for key in segment) == list(range(start, start + len(segment)))
            start += len(segment)
        most = max(most, len(plan.moves))
        held = dict(plan.places)
    assert most > 5


def test_who_leaves_costs_a_move_for_each_segment_behind() -> None:
    held = {name: place for place, name in enumerate("abcdefgh")}
    segments = [list("abc"), list("de"), list("fgh")]
    assert plan_places(held, segments, 0).moves == []
    gone = {name: place for name, place in held.items() if name != "b"}
    assert len(plan_places(gone, [list("ac"), list("de"), list("fgh")], 0).moves) == 3
    assert len(plan_places(gone, [list("ac"), list("de"), list("fgh")], 1).moves) == 1, "its own segment's only"
    assert plan_places(gone, [list("acx"), list("de"), list("fgh")], 0).moves == [], "another one takes the place"


def null_session(positions: int = 200) -> NullSession:
    return NullSession(Path(), SHAPE.signature, SessionSettings(positions))


def test_slots_that_are_given_back_are_used_again() -> None:
    """Random requests: places in a row, lengths with their owners, and none left at the end."""
    random, session = np.random.default_rng(2), null_session()
    pool: SlotPool[int] = SlotPool(session, 16)
    lengths: dict[int, int] = {}
    for key in range(400):
        if len(lengths) < 8 and pool.take(key, Claim(50, bool(random.integers(2)))):
            lengths[key] = 0
        pool.arrange()
        for each in lengths:
            slot = pool.main(each)
            if session.lengths[slot] == 0:
                lengths[each] = int(random.integers(1, 9))
                session.step(one_row(slot, lengths[each]))
            assert session.lengths[slot] == lengths[each]
        assert (session.lengths > 0).sum() == len(lengths)
        for each in [each for each in lengths if random.random() < 0.2]:
            pool.give(each)
            del lengths[each]
    for each in lengths:
        pool.give(each)
    assert session.lengths.tolist() == [0] * 16


def one_row(slot: int, count: int) -> Rows:
    scalings = np.zeros((1, count, SHAPE.blocks, SHAPE.experts), np.float32)
    tokens = np.ones((1, count), np.int64)
    return Rows(tokens, np.array([count]), slice(slot, slot + 1), scalings, np.zeros((1, 1), np.int64))


# --- a view ---------------------------------------------------------------------------------------


def test_a_view_gives_each_row_its_own_slot(tmp_path: Path) -> None:
    """Slots out of order, with others between that ride along unharmed."""
    session = open_tiny(tmp_path, SHAPE, tiny_weights(SHAPE))
    session.allocate(7)
    places = [5, 1, 4]
    texts = [(ids_for(9, seed), scalings_for(9, seed)) for seed in range(7)]
    want = [reference(SHAPE, tiny_weights(SHAPE), *text)[0] for text in texts]
    want_gate = [reference(SHAPE, tiny_weights(SHAPE), *text)[1] for text in texts]
    for slot in (2, 3):
        fed(session, slot, texts[slot], slice(0, 4))
    view = SlotView(session, places)
    for at in range(9):
        tokens = np.array([[texts[slot][0][at]] for slot in places])
        scalings = np.stack([texts[slot][1][at : at + 1] for slot in places])
        rows = Rows(tokens, np.ones(3, np.int64), slice(0, 3), scalings, np.zeros((3, 1), np.int64))
        result = view.step(rows)
        assert result.gate is not None
        for row, slot in enumerate(places):
            np.testing.assert_allclose(result.logits[row, 0], want[slot][at], atol=TOLERANCE)
            np.testing.assert_allclose(result.gate[row, 0], want_gate[slot][at], atol=TOLERANCE)
    assert session.lengths.tolist() == [0, 9, 4, 4, 9, 9, 0]
    assert view.lengths.tolist() == [9, 9, 9]
    for slot in (2, 3):
        np.testing.assert_allclose(fed(session, slot, texts[slot], slice(4, 9)), want[slot][4:], atol=TOLERANCE)
    view.truncate(0, 3)
    assert session.lengths[5] == 3
    view.reset()
    assert session.lengths.tolist() == [0, 0, 9, 9, 0, 0, 0]
    session.close()


def fed(session: OrtSession, slot: int, text: tuple[list[int], np.ndarray], span: slice) -> np.ndarray:
    """Logits of some tokens of a text."""
    ids = np.array([text[0][span]])
    index = np.arange(ids.shape[1])[None]
    rows = Rows(ids, np.array([ids.shape[1]]), slice(slot, slot + 1), text[1][None, span], index)
    return session.step(rows).logits[0]


def test_a_view_names_bad_rows_as_its_caller_does(tmp_path: Path) -> None:
    weights = tiny_weights(SHAPE)
    weights["embed"][7] = np.nan
    session = open_tiny(tmp_path, SHAPE, weights)
    session.allocate(6)
    view = SlotView(session, [5, 0, 3])
    scalings = np.zeros((3, 1, SHAPE.blocks, SHAPE.experts), np.float32)
    tokens, index = np.array([[7], [1], [7]]), np.zeros((3, 1), np.int64)
    with pytest.raises(NumericError) as caught:
        view.step(Rows(tokens, np.ones(3, np.int64), slice(0, 3), scalings, index))
    assert caught.value.rows == (0, 2)
    with pytest.raises(NumericError) as caught:
        view.step(Rows(tokens[:2], np.ones(2, np.int64), slice(1, 3), scalings[:2], index[:2]))
    assert caught.value.rows == (0,)
    session.close()


def test_a_view_counts_who_rides_along_and_keeps_its_slots() -> None:
    session = null_session()
    session.limits = StepLimits(positions=200, rows=10, decode_rows=12)
    session.allocate(6)
    view = SlotView(session, [5, 1, 4])
    assert (view.limits.rows, view.limits.decode_rows, view.limits.positions) == (8, 10, 200)
    view.allocate(3)
    with pytest.raises(InputError, match="a view has the slots it was made with; got 2; need 3"):
        view.allocate(2)
    assert len(session.lengths) == 6
