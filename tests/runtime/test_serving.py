"""Many threads, one worker: every answer is what its prompt gets alone, whatever comes, goes or fails beside it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import GenerateOptions, InputError, MachineError, Model, NumericError, Routed, complete, load
from runtime.errors import UserError
from runtime.scheduler import SchedulerOptions
from runtime.serving import Serving
from tests.runtime.tiny_bundles import tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, tiny_weights

SMALL = TinyShape(vocab=300, max_positions=200)
HOW = GenerateOptions(max_new_tokens=6)
SECONDS = 30  # more than anything here takes: a test fails rather than hangs


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", SMALL, end=())


@pytest.fixture
def model(bundle: Path) -> Iterator[Model]:
    with load(bundle, threads=1) as model:
        yield model


class Gate:
    """Holds the worker before its next step, until it is opened."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        step = model.session.step

        def held(rows: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(SECONDS)
            return step(rows)

        monkeypatch.setattr(model.session, "step", held)


def test_answers_from_many_threads_are_those_of_each_prompt_alone(model: Model) -> None:
    random = np.random.default_rng(1)
    prompts = [
        Routed(random.integers(0, 256, int(random.integers(1, 40))).tolist(), str(random.choice(["xlora", "math"])))
        for _ in range(40)
    ]
    want = [each.token_ids for each in complete(model, prompts, HOW)]
    budget = 8 * model.session.cache_bytes(1, 64)
    with Serving(model, SchedulerOptions(rows=6, kv_budget=budget, chunk_tokens=16)) as serving:

        def ask(prompt: Routed) -> tuple[int, ...]:
            answer = serving.submit(prompt, HOW)
            events = list(answer)
            found = answer.completion(SECONDS)
            assert tuple(event.token_id for event in events) == found.token_ids
            assert [event.finish_reason for event in events][:-1] == [None] * (len(events) - 1)
            assert "".join(event.text for event in events) == found.text
            return found.token_ids

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, prompts)) == want
    assert complete(model, prompts[:1], HOW)[0].token_ids == want[0], "the model is free again"


def test_a_cancelled_answer_ends_and_its_place_is_taken(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)
    with Serving(model, SchedulerOptions(rows=1)) as serving:
        first, second, third = (serving.submit([n + 1], HOW) for n in range(3))
        assert gate.reached.wait(SECONDS)
        first.cancel()
        second.cancel()
        gate.opened.set()
        assert len(third.completion(SECONDS).token_ids) == 6
        for answer in (first, second):
            assert len(list(answer)) < 6
            assert list(answer) == []
            with pytest.raises(InputError, match="the request was cancelled"):
                answer.completion(SECONDS)
        third.cancel()
        assert third.completion(SECONDS).timings.new_tokens == 6


def test_bad_prompts_are_refused_by_the_caller(model: Model) -> None:
    options = SchedulerOptions(kv_budget=2 * model.session.cache_bytes(1, 64))
    with Serving(model, options) as serving:
        with pytest.raises(InputError, match="unknown token ids"):
            serving.submit([500])
        with pytest.raises(InputError, match="the request does not fit the K/V budget"):
            serving.submit([1], GenerateOptions(max_new_tokens=100))
        for own in ({"decode": "exact"}, {"batch_size": 3}, {"kv_budget": 10}):
            with pytest.raises(InputError, match="decode, batch_size and kv_budget are of all requests"):
                serving.submit([1], GenerateOptions(max_new_tokens=1, **own))  # type: ignore[arg-type]
        assert len(serving.submit([1], HOW).completion(SECONDS).token_ids) == 6


def test_a_full_queue_is_the_machines(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)
    with Serving(model, SchedulerOptions(rows=1), most_waiting=2) as serving:
        running = serving.submit([1], HOW)
        assert gate.reached.wait(SECONDS)
        waiting = []
        with pytest.raises(MachineError, match="too many requests wait; got 2"):
            waiting += [serving.submit([n], HOW) for n in (2, 3, 4)]
        gate.opened.set()
        assert running.completion(SECONDS)


def test_bad_numbers_reach_their_own_caller_only(tmp_path: Path) -> None:
    weights = tiny_weights(SMALL)
    weights["embed"][250] = np.nan
    with load(tiny_bundle(tmp_path / "b", SMALL, weights=weights, end=()), threads=1) as model:
        want = complete(model, [[1, 2]], HOW)[0].token_ids
        with Serving(model) as serving:
            good, bad, other = (serving.submit(prompt, HOW) for prompt in ([1, 2], [3, 250], [1, 2]))
            assert good.completion(SECONDS).token_ids == other.completion(SECONDS).token_ids == want
            with pytest.raises(NumericError, match="prompt 2"):
                bad.completion(SECONDS)
            with pytest.raises(NumericError, match="prompt 2"):
                list(bad)


def test_a_fault_of_the_machine_ends_what_runs_and_nothing_else(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)
    step, faults = model.session.step, [MachineError("not enough memory for this step")]

    def failing(rows: Any) -> Any:
        result = step(rows)
        if faults:
            raise faults.pop()
        return result

    monkeypatch.setattr(model.session, "step", failing)
    with Serving(model, SchedulerOptions(rows=1)) as serving:
        running = serving.submit([1], HOW)
        assert gate.reached.wait(SECONDS)
        waiting = serving.submit([2], HOW)
        gate.opened.set()
        with pytest.raises(MachineError, match="not enough memory for this step"):
            running.completion(SECONDS)
        assert len(waiting.completion(SECONDS).token_ids) == 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_worker_that_broke_down(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, opened = threading.Event(), threading.Event()

    def defect(rows: Any) -> Any:
        reached.set()
        assert opened.wait(SECONDS)
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(model.session, "step", defect)
    serving = Serving(model)
    running = serving.submit([1], HOW)
    assert reached.wait(SECONDS)
    just_came = serving.submit([2], HOW)
    opened.set()
    with pytest.raises(UserError, match="the serving broke down; got ZeroDivisionError"):
        running.completion(SECONDS)
    with pytest.raises(InputError, match="the request was cancelled"):
        just_came.completion(SECONDS)
    serving.close()
    with pytest.raises(InputError, match="serving: it is closed and takes no more requests"):
        serving.submit([1], HOW)


def test_closing_cancels_what_runs_and_what_waits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)
    serving = Serving(model, SchedulerOptions(rows=1))
    answers = [serving.submit([n + 1], HOW) for n in range(3)]
    assert gate.reached.wait(SECONDS)
    closing = threading.Thread(target=serving.close)
    closing.start()
    gate.opened.set()
    closing.join(SECONDS)
    assert not closing.is_alive()
    for answer in answers:
        with pytest.raises(InputError, match="the request was cancelled"):
            answer.completion(SECONDS)
    assert model.session.lengths.tolist() == []
    with pytest.raises(InputError, match="takes no more requests"):
        serving.submit([1], HOW)
    serving.close()


def test_an_answer_that_takes_too_long_can_be_asked_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)
    with Serving(model) as serving:
        answer = serving.submit([1], HOW)
        with pytest.raises(TimeoutError):
            answer.completion(0.01)
        gate.opened.set()
        assert answer.completion(SECONDS).timings.new_tokens == 6
