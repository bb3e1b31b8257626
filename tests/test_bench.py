"""The run of scripts/bench: order, agreement, and what happens when a worker fails."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.benchmark.environments import Environment, EnvironmentMissingError, Environments
from scripts.benchmark.layouts import FORMS, LayoutError, Models, run
from scripts.benchmark.process import Memory, Worker, WorkerError, environment_with, memory_from_status
from scripts.benchmark.results import Agreement, first_differences
from scripts.benchmark.rounds import rotated
from scripts.benchmark.subjects import Case, Sweep
from scripts.benchmark.tables import agreement_rows, failure_rows, step_rows
from tests.bench_fakes import FAKES, GATED, PEER, PLAN, Fakes, measured, write_models

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def models(tmp_path: Path) -> dict[int, Models]:
    """Of both numbers of experts."""
    return write_models(tmp_path)


# --- order --------------------------------------------------------------------------------------------------------


def test_every_case_goes_to_all_in_turn_and_each_round_begins_with_another(models: dict[int, Models]) -> None:
    fakes = Fakes()
    measured(models, fakes, replace(PLAN, experts=(4,)))
    warm, cases = 4, [(1, 1), (8, 1), (8, 2)]
    rounds = np.array_split(np.array(fakes.log, dtype=object), 3)
    for turn, asked in enumerate(rounds):
        order = [subject.name for subject in rotated(FAKES, turn)]
        assert [name for name, *_ in asked] == order * (1 + len(cases))
        assert [tuple(rest) for _, *rest in asked[warm:]] == [case for case in cases for _ in FAKES]
    assert len({asked[0][0] for asked in rounds}) == 3


def test_every_round_starts_everybody_anew_and_ends_everybody(models: dict[int, Models]) -> None:
    fakes = Fakes()
    found = measured(models, fakes)
    per_round = ["gated", "plain", "peer", "other", "gated", "peer"]  # the model of 2 experts has no plain base
    assert sorted(fakes.started) == sorted(fakes.closed) == sorted(per_round * 3)
    assert len(found.results.loaded["gated", 2]) == 3


def test_a_case_of_two_sweeps_is_measured_once() -> None:
    assert PLAN.cases(4) == [Case(1, 1, 4, 4), Case(8, 1, 4, 4), Case(8, 2, 4, 4)]
    assert PLAN.cases(2) == [Case(1, 1, 2, 4)]
    assert PLAN.sweep(Sweep.CONTEXT)[8] == PLAN.sweep(Sweep.BATCH)[1]
    assert PLAN.sweep(Sweep.CONTEXT)[1] == PLAN.sweep(Sweep.EXPERTS)[4]


def test_a_slow_subject_is_asked_for_fewer_tokens_and_all_see_the_same_prompts() -> None:
    case = Case(8, 2, 4, 18)
    assert (case.tokens_of(GATED), case.tokens_of(PEER), Case(8, 1, 4, 1).tokens_of(GATED)) == (18, 3, 3)
    longer = Case(9, 2, 4, 18).prompts(50)
    assert [row[:8] for row in longer] == case.prompts(50)
    assert longer[0] != longer[1]
    assert min(map(min, longer)) >= 3


# --- whose tokens agree -------------------------------------------------------------------------------------------


def test_first_differences_are_by_row_and_as_far_as_both_go() -> None:
    assert first_differences([[1, 2, 3], [4, 5, 6]], [[1, 2], [4, 9]]) == [(1, 1)]
    assert first_differences([[1, 2]], [[1, 2, 9]]) == []
    assert first_differences([[1, 2, 3]], [[7, 2, 9]]) == [(0, 0)]


@pytest.mark.parametrize(("margin", "text", "is_same"), [(5e-5, "tie at 2", True), (2e-4, "differs at 2", False)])
def test_other_tokens_are_a_tie_only_below_the_margin(
    models: dict[int, Models], margin: float, text: str, is_same: bool
) -> None:
    fakes = Fakes(
        {
            "gated": {"margin_of": lambda prompt: margin},
            "peer": {"tokens": lambda row, step: step + (row == 1 and step == 2)},
        }
    )
    found = measured(models, fakes)
    agreement = found.results.agreements["peer", Case(8, 2, 4, 4)]
    assert str(agreement).startswith(text)
    assert agreement.is_same is is_same
    assert str(found.results.agreements["peer", Case(8, 1, 4, 4)]) == "same 3"
    [row] = [row for row in agreement_rows(found) if row[""] == "peer"]
    assert (row["held to"], row["equal"], row["ties"]) == ("gated", "3", "1" if is_same else "0")
    assert ("context 8, batch 2" in row["others"]) is not is_same


def test_a_real_difference_is_not_hidden_by_a_tie_of_another_row_or_round() -> None:
    agreements = [Agreement("gated", 4, 1, 5e-5), Agreement("gated", 4, 3, 0.1), Agreement("gated", 4)]
    assert [a.is_same for a in agreements] == [True, False, True]
    assert not Agreement("gated", 4, 1, None).is_same  # nobody knows how sure the reference was


def test_a_difference_of_one_round_stays(models: dict[int, Models]) -> None:
    """Of three, the middle one."""
    fakes = Fakes()

    def peers(row: int, step: int) -> int:
        return step + (fakes.started.count("peer") == 3)  # each round starts it for both models

    fakes.settings["peer"] = {"tokens": peers}
    agreements = measured(models, fakes).results.agreements
    assert not agreements["peer", Case(8, 1, 4, 4)].is_same
    assert agreements["peer", Case(1, 1, 2, 4)].is_same


@pytest.mark.parametrize("tied_row", [0, 1])
def test_the_worst_row_counts(models: dict[int, Models], tied_row: int) -> None:
    """Of two rows that differ, one of them by a tie."""
    case = Case(8, 2, 4, 4)

    def margin(prompt: list[int]) -> float:
        return 1e-6 if prompt == case.prompts(50)[tied_row] else 0.3

    fakes = Fakes({"gated": {"margin_of": margin}, "peer": {"tokens": lambda row, step: 40 + step}})
    agreement = measured(models, fakes).results.agreements["peer", case]
    assert (agreement.margin, agreement.is_same) == (0.3, False)


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_case_that_fails_is_listed_once_and_stops_nobody(models: dict[int, Models]) -> None:
    fakes = Fakes({"peer": {"fails_at": lambda context, batch: "cannot do that" if context > 1 else ""}})
    found = measured(models, fakes)
    assert len(found.results.step["peer", Case(1, 1, 4, 4)]) == 3
    assert len(found.results.step["gated", Case(8, 2, 4, 4)]) == 3
    assert [entry for entry in fakes.log if entry == ("peer", 8, 1)] == [("peer", 8, 1)]
    [row] = failure_rows(found)
    assert row == {
        "": "peer",
        "cases": "context 8, batch 1, 4 experts; context 8, batch 2, 4 experts",
        "message": "cannot do that",
    }


def test_a_worker_that_dies_of_a_case_is_started_again_for_the_others(models: dict[int, Models]) -> None:
    fakes = Fakes({"peer": {"fails_at": lambda c, b: "ended with code -9" if (c, b) == (8, 1) else "", "dies": True}})
    found = measured(models, fakes)
    assert len(found.results.step["peer", Case(8, 2, 4, 4)]) == 3
    assert fakes.started.count("peer") == 3 * 2 + 1
    assert sorted(fakes.started) == sorted(fakes.closed)


@pytest.mark.parametrize("error", [EnvironmentMissingError("no network"), LayoutError("no"), WorkerError("bad file")])
def test_what_cannot_start_is_left_out_by_name(models: dict[int, Models], error: Exception) -> None:
    found = measured(models, Fakes(missing={"peer": error}))
    assert not any(name == "peer" for name, _ in found.results.step)
    [row] = failure_rows(found)
    assert row == {"": "peer", "cases": "all with 4 experts; all with 2 experts", "message": str(error)}
    assert "peer" not in {row[""] for row in step_rows(found, Sweep.CONTEXT)}


def test_without_a_package_index_an_environment_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    known = {"rust": Environment(("mistralrs==0.9.5",))}
    environments = Environments(tmp_path, known=known)
    with pytest.raises(EnvironmentMissingError, match=r"ERROR: No matching distribution found for mistralrs==0\.9\.5"):
        environments.python("rust")
    (tmp_path / "rust" / "pyvenv.cfg").unlink()
    with pytest.raises(EnvironmentMissingError, match="No matching distribution"):
        environments.python("rust")
    assert not (tmp_path / "rust" / "pyvenv.cfg").exists(), "it is tried once a run"
    with pytest.raises(EnvironmentMissingError, match=r"mistralrs==0\.9\.5 is not installed, and --no-install"):
        Environments(tmp_path, may_install=False, known=known).python("rust")


def test_a_converter_that_fails_says_its_last_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LayoutError, match=r"-c import sys.* failed: ValueError: not this"):
        run([sys.executable, "-c", "import sys; raise ValueError('not this')"])

    def fail(models: Models, folder: Path) -> None:
        folder.mkdir()
        raise LayoutError("no")

    monkeypatch.setitem(FORMS, "half", fail)
    models = Models(tmp_path / "model", 1, Environments(tmp_path))
    for _ in range(2):  # what is left of the first attempt is no hindrance
        with pytest.raises(LayoutError, match=r"^no$"):
            models.path("half")
        assert not (tmp_path / "model" / "half").exists()


# --- processes ----------------------------------------------------------------------------------------------------

SERVER = """
import ctypes, os, sys, time
from scripts.benchmark.workers.serve import serve
class Model:
    def generate(self, prompts, new_tokens, clock):
        print("a library prints this")
        if new_tokens == 7: raise ValueError("too\\nmuch")
        if new_tokens == 8: sys.stderr.write("last words\\n"); sys.stderr.flush(); os._exit(3)
        if new_tokens == 9: time.sleep(60)
        given = new_tokens - (new_tokens == 6)
        for step in range(given):
            for row in range(len(prompts)): time.sleep(0.005); clock.tick(row)
        return [list(range(given)) for _ in prompts]
serve(lambda request: Model(), "numpy")
"""


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    worker = Worker([sys.executable, "-c", SERVER], tmp_path / "log", environment_with(1, ROOT), ROOT)
    worker.ask({"do": "load"})
    yield worker
    worker.close()


def request(new_tokens: int) -> dict[str, Any]:
    return {"do": "generate", "prompts": [[1], [2]], "new_tokens": new_tokens}


def test_a_worker_answers_while_libraries_print_and_has_memory(worker: Worker, tmp_path: Path) -> None:
    answer = worker.ask(request(4))
    assert answer["tokens"] == [[0, 1, 2, 3]] * 2
    assert answer["seconds"][0] >= 0.0095, "a token is there when the last row has it"
    memory = worker.memory()
    assert 2**20 < memory.anonymous <= memory.resident <= memory.peak_resident
    worker.close()
    assert not worker.is_alive
    assert "a library prints this" in (tmp_path / "log").read_text()  # buffered, until the process ends


def test_errors_are_one_line_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"^ValueError: too much$"):
        worker.ask(request(7))
    with pytest.raises(WorkerError, match=r"^RuntimeError: gave 5 tokens, not 6$"):
        worker.ask(request(6))
    assert worker.ask(request(3))["tokens"]


def test_a_dead_worker_leaves_its_last_words(worker: Worker) -> None:
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"^ended with code 3: last words$"):
            worker.ask(request(8))
    assert not worker.is_alive


def test_a_silent_worker_is_ended(worker: Worker) -> None:
    with pytest.raises(WorkerError, match=r"^no answer in 0\.2 s$"):
        worker.ask(request(9), limit=0.2)
    assert not worker.is_alive


def test_memory_is_read_from_proc() -> None:
    text = "Name:\tx\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\nRssAnon:\t  100 kB\n"
    assert memory_from_status(text) == Memory(200 * 1024, 100 * 1024, 300 * 1024)
