"""When `auto` drafts: the rule, and what it comes to on texts and machines of all kinds. No test reads a clock."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from runtime import GenerateOptions, complete, load
from runtime.pace import EVERY, STRETCH, Pace, StepKind, StepSeconds, drafts_pay
from runtime.rows import Rows, StepResult
from tests.runtime.tiny_bundles import BYTE_SHAPE, tiny_bundle
from tests.runtime.tiny_graphs import tiny_weights

BOUND_BY_MEMORY = StepSeconds(scaling=1.0, drafting=1.05, main=1.0, paired=1.1)
BOUND_BY_COMPUTE = StepSeconds(scaling=1.0, drafting=1.05, main=1.0, paired=2.0)


@pytest.mark.parametrize(
    ("accepted", "rows", "seconds", "pays"),
    [
        (1.0, 1, BOUND_BY_MEMORY, True),
        (0.2, 1, BOUND_BY_MEMORY, True),  # 1.1 + 0.8 * 1.05 = 1.94
        (0.1, 1, BOUND_BY_MEMORY, False),  # 1.1 + 0.9 * 1.05 = 2.045
        (0.0, 1, BOUND_BY_MEMORY, False),
        (0.8, 4, BOUND_BY_MEMORY, True),  # one of four rows misses with 0.59
        (0.8, 16, BOUND_BY_MEMORY, False),  # of sixteen with 0.97
        (1.0, 16, BOUND_BY_MEMORY, True),
        (1.0, 1, BOUND_BY_COMPUTE, False),  # nothing is won, nothing lost
        (0.9, 1, StepSeconds(1.0, 2.0, 1.0, 1.9), False),  # a large vocabulary makes drafts dear
        (0.9, 1, StepSeconds(1.0, 1.0, 1.0, 1.85), True),
    ],
)
def test_the_rule(accepted: float, rows: int, seconds: StepSeconds, pays: bool) -> None:
    assert drafts_pay(accepted, rows, seconds) is pays


class Decoding:
    """Rows whose drafts come true at random, and a clock that their steps move."""

    def __init__(self, seconds: StepSeconds, seed: int = 0, noise: float = 0.0, rows: int = 1) -> None:
        self.now, self.random, self.noise = 0.0, np.random.default_rng(seed), noise
        self.seconds = {kind: getattr(seconds, kind.value) for kind in StepKind}
        self.pace, self.rows = Pace(rows, lambda: self.now), rows
        self._ran = False
        self.steps = 0

    def tokens(self, count: int, accepted: float) -> list[bool]:
        """Decode: at which tokens drafts ran."""
        drafted = []
        for _ in range(count):
            came_true = self.random.random(self.rows) < accepted
            for each in came_true if self._ran else ():
                self.pace.saw_draft(came_true=bool(each))
            runs = self.pace.drafts(self.rows)
            if not (self._ran and came_true.all()):
                self._step(StepKind.DRAFTING if runs else StepKind.SCALING)
            self._step(StepKind.PAIRED if runs else StepKind.MAIN)
            self._ran = runs
            drafted.append(runs)
        return drafted

    def _step(self, kind: StepKind) -> None:
        with self.pace.timed(kind):
            self.now += self.seconds[kind] * (1 + self.noise * self.random.random()) + (50 if self.steps == 0 else 0)
            self.steps += 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("accepted", "seconds", "low", "high"),
    [
        (1.0, BOUND_BY_MEMORY, 0.95, 1.0),
        (0.8, BOUND_BY_MEMORY, 0.95, 1.0),
        (0.5, BOUND_BY_MEMORY, 0.85, 1.0),
        (0.0, BOUND_BY_MEMORY, 0.0, 0.15),
        (0.6, BOUND_BY_COMPUTE, 0.0, 0.15),
    ],
)
def test_most_tokens_go_the_faster_way(
    seed: int, accepted: float, seconds: StepSeconds, low: float, high: float
) -> None:
    decoding = Decoding(seconds, seed, noise=0.2)
    assert low <= np.mean(decoding.tokens(2_000, accepted)) <= high


def test_it_costs_little_more_than_the_faster_way() -> None:
    for accepted, seconds, best in ((0.0, BOUND_BY_MEMORY, 2.0), (0.95, BOUND_BY_MEMORY, 1.1 + 0.05 * 1.05)):
        decoding = Decoding(seconds)
        decoding.tokens(5_000, accepted)
        assert decoding.now < 1.04 * best * 5_000 + 50


def test_it_begins_with_drafts_and_then_times_the_other_way() -> None:
    drafted = Decoding(BOUND_BY_MEMORY).tokens(STRETCH + 4, 1.0)
    assert drafted[:STRETCH] == [True] * STRETCH
    assert not drafted[STRETCH]
    assert drafted[-1]


@pytest.mark.parametrize(("rows", "stretch"), [(1, 8), (2, 4), (3, 3), (8, 3)])
def test_rows_that_tell_more_at_a_time_are_asked_for_less(rows: int, stretch: int) -> None:
    """At first and later; a try with drafts is what `auto` costs where they do not pay."""
    drafted = Decoding(BOUND_BY_MEMORY, rows=rows).tokens(1_000, 0.0)
    stretches = [len(part) for part in "".join("01"[each] for each in drafted).split("0") if part]
    assert drafted[:stretch] == [True] * stretch
    assert set(stretches[:-1]) == {stretch}
    assert len(stretches) > 10


def test_the_first_step_of_each_kind_does_not_count() -> None:
    """It binds memory, and there may be no second one for long."""
    pace = Decoding(BOUND_BY_MEMORY).pace
    for kind in StepKind:
        with pace.timed(kind):
            pass
        assert not pace._seconds[kind]
        with pace.timed(kind):
            pass
        assert len(pace._seconds[kind]) == 1


def test_tokens_without_drafts_are_tried_until_both_passes_were_timed() -> None:
    """The first has its gate from the draft before it, the second binds the scaling pass, the third times it."""
    assert Decoding(BOUND_BY_MEMORY).tokens(STRETCH + 4, 1.0)[STRETCH:] == [False, False, False, True]


def test_a_stretch_after_which_no_draft_met_its_token_is_tried_again() -> None:
    """No share can be made of no drafts."""
    pace = Decoding(BOUND_BY_MEMORY).pace
    for _ in range(2):
        for kind in StepKind:
            with pace.timed(kind):
                pass
    assert [pace.drafts(1) for _ in range(3 * STRETCH)] == [True] * 3 * STRETCH


def test_without_drafts_it_tries_a_stretch_now_and_then() -> None:
    drafted = Decoding(BOUND_BY_MEMORY).tokens(1_000, 0.0)[100:]
    stretches = [len(part) for part in "".join("01"[each] for each in drafted).split("0") if part]
    pauses = [len(part) for part in "".join("01"[each] for each in drafted).strip("0").split("1") if part]
    assert set(stretches[1:-1]) == {STRETCH}
    assert set(pauses) == {EVERY}


@pytest.mark.parametrize("rows", [1, 4])
def test_it_follows_a_text_that_changes(rows: int) -> None:
    """After one try; of four rows, what came before would outweigh it."""
    decoding = Decoding(BOUND_BY_MEMORY, rows=rows)
    assert np.mean(decoding.tokens(500, 0.0)) < 0.2
    decoding.tokens(EVERY + 2 * STRETCH, 0.95)
    assert np.mean(decoding.tokens(200, 0.95)) > 0.9
    decoding.tokens(100, 0.0)
    assert np.mean(decoding.tokens(500, 0.0)) < 0.2


def test_it_follows_a_machine_that_changes() -> None:
    """A row that grows, or another process on the same cores."""
    decoding = Decoding(BOUND_BY_MEMORY)
    assert np.mean(decoding.tokens(500, 0.9)) > 0.9
    decoding.seconds[StepKind.PAIRED] = 3.0
    decoding.tokens(100, 0.9)
    assert np.mean(decoding.tokens(500, 0.9)) < 0.2


def test_a_step_that_failed_is_not_timed() -> None:
    pace = Decoding(BOUND_BY_MEMORY).pace
    with pytest.raises(ValueError, match="no"), pace.timed(StepKind.MAIN):
        raise ValueError("no")
    assert not pace._timed_at


def test_drafts_of_rows_that_ended_are_no_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of zeros: every draft that meets a token comes true. Half of the rows end with a draft in hand."""
    seen: list[bool] = []
    saw_draft = Pace.saw_draft
    monkeypatch.setattr("runtime.pace.LEAST_STRETCH", STRETCH)  # long enough for rows to end in it
    monkeypatch.setattr(
        Pace, "saw_draft", lambda self, *, came_true: seen.append(came_true) or saw_draft(self, came_true=came_true)
    )
    weights = {n: a * (not n.startswith("expert")) for n, a in tiny_weights(BYTE_SHAPE).items()}
    prompts = [[1, 2], [3], [4], [5, 6, 7]]
    with load(tiny_bundle(tmp_path / "b", weights=weights, end=()), threads=1) as model:
        options = GenerateOptions(max_new_tokens=10, decode="auto")
        free = [each.token_ids for each in complete(model, prompts, options)]
        seen.clear()
        stop = tuple(text[4] for text in free[:2])
        found = complete(model, prompts, dataclasses.replace(options, stop_token_ids=stop))
    assert len({len(each.token_ids) for each in found}) > 1
    assert all(seen)
    came = [each.timings.accepted for each in found]
    assert len(seen) == sum(came) - sum(each.finish_reason == "stop" for each in found if each.timings.accepted)


# --- in a generation ------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "share"), [(0.0, (0.9, 1.0)), (1.0, (0.05, 0.25))])
def test_generations_pair_where_drafts_come_true(
    tmp_path: Path, experts: float, share: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session in which every step takes the same time, whatever it carries."""
    now, paired = 0.0, []
    weights = {n: a * np.float32(experts if n.startswith("expert") else 1) for n, a in tiny_weights(BYTE_SHAPE).items()}
    monkeypatch.setattr("runtime.ladder.Pace", lambda rows: Pace(rows, lambda: now))
    with load(tiny_bundle(tmp_path / "b", weights=weights, end=()), threads=1) as model:
        step = model.session.step

        def timed(rows: Rows) -> StepResult:
            nonlocal now
            now += 1.1 if len(rows.counts) == 8 else 1.0
            if rows.slots.stop == 8:
                paired.append(len(rows.counts) == 8)
            return step(rows)

        monkeypatch.setattr(model.session, "step", timed)
        found = complete(model, [[1, 2], [3], [4], [5, 6, 7]], GenerateOptions(max_new_tokens=190, decode="auto"))
    assert len(paired) == 190
    assert share[0] <= np.mean(paired) <= share[1]
    if experts:
        assert 0 < sum(each.timings.accepted for each in found) < sum(each.timings.drafts for each in found)
