"""Requests that come and go: each gets what it gets alone, in shared steps, within its memory, in its turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import GenerateOptions, InputError, MachineError, Model, NumericError, Routed, Sampling, complete, load
from runtime.decode import Decode, DecodeMode
from runtime.generate import generate
from runtime.model import Turn
from runtime.passes import Routing
from runtime.prompts import requests_of
from runtime.request import Limits, Request
from runtime.rows import Rows, StepResult
from runtime.sampling import Sampler
from runtime.scheduler import Scheduler, SchedulerOptions
from runtime.serving import Serving
from runtime.session import StepLimits
from runtime.signature import CacheStyle
from runtime.tickets import Ticket
from tests.runtime import fake_tensorrt
from tests.runtime.tiny_bundles import SCALING_PASS, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, reference_exact, tiny_weights
from tests.same_tokens import Logits, Ties, seen_logits

SMALL = TinyShape(vocab=40, max_positions=200)
VARIANTS = ("xlora", "xlora", "math", "base")
STYLES = (CacheStyle.APPEND, CacheStyle.ALIAS)
MODES = ("exact", "paired", "auto")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[CacheStyle, Model]]:
    opened = {}
    for style in STYLES:
        shape = dataclasses.replace(SMALL, cache=style)
        path = tiny_bundle(tmp_path_factory.mktemp("bundles") / style, shape, tokenizer=False, end=())
        opened[style] = load(path, threads=1)
    yield opened
    for model in opened.values():
        model.close()


@pytest.fixture
def model(models: dict[CacheStyle, Model]) -> Model:
    return models[CacheStyle.APPEND]


def asked(random: np.random.Generator, count: int, longest: int = 30) -> list[Routed]:
    """Prompts of random tokens, lengths and variants."""
    lengths = random.integers(1, longest, count)
    return [Routed(random.integers(0, SMALL.vocab, n).tolist(), str(random.choice(VARIANTS))) for n in lengths]


class Run:
    """A scheduler with its requests; after each step it looks at what must always hold."""

    def __init__(self, model: Model, options: SchedulerOptions, asked: Sequence[Routed], how: GenerateOptions) -> None:
        self.model, self.options = model, options
        self.scheduler = Scheduler(model.turn, options)
        self.requests, self.ways = requests_of(model, asked, how, None)
        self.tickets: list[Ticket | None] = [None] * len(asked)
        self.steps = 0

    def submit(self, number: int) -> Ticket:
        way = self.ways[number]
        ticket = self.scheduler.submit(self.requests[number], way.route.routing, way.session)
        self.tickets[number] = ticket
        return ticket

    def step(self) -> list[int]:
        """The prompts that got a token."""
        events = self.scheduler.step()
        self.steps += 1
        assert self.scheduler.kv_bytes == held_bytes(self.model)
        assert self.scheduler.kv_bytes <= (self.options.kv_budget or 1 << 40)
        return [event.prompt for event in events]

    def to_end(self) -> None:
        while not self.scheduler.is_idle:
            self.step()
            assert self.steps < 5_000


def held_bytes(model: Model) -> int:
    """What the K/V arrays really take."""
    session: Any = model.session
    return sum(group.memory.nbytes for group in session._caches.groups)


def alone(model: Model, asked: Sequence[Routed], how: GenerateOptions) -> dict[int, Logits]:
    """What each prompt's tokens are chosen from when it runs alone, in exact decoding."""
    found = {}
    for number, prompt in enumerate(asked):
        with seen_logits() as seen:
            complete(model, [prompt], dataclasses.replace(how, decode="exact"))
        found[number] = seen[0]
    return found


def options_for(decode: str, **others: Any) -> SchedulerOptions:
    return SchedulerOptions(decode=Decode(DecodeMode(decode)), **others)


# --- each as alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("decode", MODES)
def test_random_arrivals_get_what_they_get_alone(
    models: dict[CacheStyle, Model], style: CacheStyle, decode: str
) -> None:
    """Random lengths, variants, rows, budgets, chunks, arrivals and cancellations."""
    model, ties = models[style], Ties()
    random = np.random.default_rng([STYLES.index(style), MODES.index(decode)])
    for _ in range(8):
        prompts, how = asked(random, 12), GenerateOptions(max_new_tokens=int(random.integers(1, 14)))
        want = alone(model, prompts, how)
        slot = model.session.cache_bytes(1, 64)
        options = options_for(
            decode,
            rows=int(random.integers(1, 7)),
            kv_budget=random.choice([None, int(slot * random.integers(2, 9))]),
            chunk_tokens=int(random.integers(1, 20)),
        )
        run = Run(model, options, prompts, how)
        cancelled = set(random.choice(12, 3, replace=False).tolist())
        with seen_logits() as seen:
            for number in range(len(prompts)):
                run.submit(number)
                for _ in range(int(random.integers(0, 5))):
                    run.step()
                if number in cancelled:
                    victim = run.tickets[int(random.integers(0, number + 1))]
                    assert victim is not None
                    run.scheduler.cancel(victim)
            run.to_end()
        for number, ticket in enumerate(run.tickets):
            assert ticket is not None
            assert ticket.is_ended
            assert ticket.error is None
            got = seen.get(number, [])
            if ticket.is_cancelled:
                ties.compare(want[number][: len(got)], got, f"cancelled prompt {number}, {decode}")
            else:
                ties.compare(want[number], got, f"prompt {number}, {decode}")
        assert run.scheduler._lease is not None
        assert not run.scheduler._lease.pool._places
    ties.check()


def test_a_dropped_expert_is_noticed(model: Model, tmp_path: Path) -> None:
    """The comparison above would prove little if adapters did not matter."""
    prompts, how = asked(np.random.default_rng(3), 6), GenerateOptions(max_new_tokens=8)
    prompts = [Routed(prompt.prompt, "xlora") for prompt in prompts]
    want = alone(model, prompts, how)
    for dropped in range(SMALL.experts):
        weights = tiny_weights(SMALL)
        weights |= {
            name: array * 0 for name, array in weights.items() if name.endswith(f"_{dropped}") and "exp" in name
        }
        path = tiny_bundle(tmp_path / str(dropped), SMALL, weights=weights, tokenizer=False, end=())
        with load(path, threads=1) as other:
            run = Run(other, options_for("paired"), prompts, how)
            with seen_logits() as seen:
                for number in range(len(prompts)):
                    run.submit(number)
                run.to_end()
            apart = max(float(np.abs(want[n][0] - seen[n][0]).max()) for n in want)
        assert apart > 0.1
        first = next(iter(want))
        with pytest.raises(AssertionError, match=r"another token at step|logits differ"):
            Ties().compare(want[first], seen[first], "dropped")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("decode", MODES)
def test_a_seed_draws_the_same_tokens_in_any_company(
    models: dict[CacheStyle, Model], style: CacheStyle, decode: str
) -> None:
    model, random = models[style], np.random.default_rng(4)
    prompts = asked(random, 10)
    how = GenerateOptions(max_new_tokens=9, sampling=Sampling(1.3, top_k=12, seed=5), decode=decode)
    want = [complete(model, [prompt], how)[0].token_ids for prompt in prompts]
    run = Run(model, options_for(decode, rows=4, chunk_tokens=5), prompts, how)
    for number in range(len(prompts)):
        run.submit(number)
        run.step()
    run.to_end()
    assert [request.completion().token_ids for request in run.requests] == want
    greedy = GenerateOptions(max_new_tokens=9, decode=decode)
    assert [complete(model, [prompt], greedy)[0].token_ids for prompt in prompts] != want


# --- steps are shared, and nobody is stalled ------------------------------------------------------


def gated(count: int, length: int = 4) -> list[Routed]:
    return [Routed([n % SMALL.vocab + 1] * length, "xlora") for n in range(count)]


def test_eight_requests_take_the_steps_of_one(model: Model, steps: list[Rows]) -> None:
    run = Run(model, options_for("exact"), gated(8), GenerateOptions(max_new_tokens=10))
    for number in range(8):
        run.submit(number)
    run.to_end()
    assert [len(rows.counts) for rows in steps] == [8] * 20  # the prompts in one step, two passes a token
    assert run.steps == 9  # the first of them decodes, too


def test_gated_and_constant_rows_share_the_main_pass(model: Model, steps: list[Rows]) -> None:
    prompts = [Routed([n + 1, 2], variant) for n, variant in enumerate(("xlora", "math", "xlora", "base", "code"))]
    run = Run(model, options_for("exact"), prompts, GenerateOptions(max_new_tokens=4))
    for number in range(5):
        run.submit(number)
    run.to_end()
    assert [len(rows.counts) for rows in steps] == [2, 5] * 4


def test_one_that_joins_shares_the_next_token(model: Model, steps: list[Rows]) -> None:
    run = Run(model, options_for("exact"), gated(2), GenerateOptions(max_new_tokens=6))
    run.submit(0)
    run.step()
    run.submit(1)
    steps.clear()
    assert run.step() == [1, 0, 1]  # its prompt, then a token of both
    assert [len(rows.counts) for rows in steps] == [1, 1, 2, 2]
    run.to_end()
    assert [len(rows.counts) for rows in steps[-2:]] == [1, 1]  # the other one is alone at its end


def test_a_gap_is_closed_by_a_move_or_by_who_comes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[int, int]] = []
    move = model.session.move
    monkeypatch.setattr(model.session, "move", lambda *slots: moves.append(slots) or move(*slots))
    run = Run(model, options_for("exact"), gated(6), GenerateOptions(max_new_tokens=6))
    for number in range(4):
        run.submit(number)
    run.step()
    first = run.tickets[0]
    assert first is not None
    run.scheduler.cancel(first)
    run.submit(4)
    run.step()
    assert moves == []
    run.scheduler.cancel(run.tickets[1])  # type: ignore[arg-type]
    run.step()
    assert len(moves) == 2  # of a scaling and of a main slot
    run.to_end()


def test_a_long_prompt_stalls_nobody(model: Model, steps: list[Rows]) -> None:
    """While it comes in, others get a token a step, and a short one behind it begins long before it."""
    prompts = [*gated(3), Routed([7] * 150, "xlora"), Routed([3] * 5, "xlora"), Routed([4] * 5, "math")]
    run = Run(model, options_for("exact", chunk_tokens=10), prompts, GenerateOptions(max_new_tokens=40))
    for number in range(3):
        run.submit(number)
    run.step()
    for number in (3, 4, 5):
        run.submit(number)
    steps.clear()
    begun: dict[int, int] = {}
    while 3 not in begun:
        before = set(begun)
        got = run.step()
        assert {0, 1, 2} <= set(got)
        assert before <= set(got), "who has begun gets a token a step"
        begun |= {prompt: run.steps for prompt in got if prompt not in begun}
    assert begun[4] - 1 <= 3
    assert begun[5] - 1 <= 4
    assert begun[3] >= 16
    assert max(rows.tokens.size for rows in steps) == 10, "no step is longer than a chunk"
    run.to_end()


def test_nobody_is_padded_to_a_prompt(model: Model, steps: list[Rows]) -> None:
    """Of two new prompts one has a slot between decoding rows: they come in apart."""
    prompts = [Routed([1, 2], "xlora"), Routed([3], "math"), Routed([4] * 6, "xlora"), Routed([5] * 6, "math")]
    run = Run(model, options_for("exact"), prompts, GenerateOptions(max_new_tokens=9))
    run.submit(0)
    run.submit(1)
    run.step()
    run.submit(2)
    run.submit(3)
    run.to_end()
    chunks = [rows for rows in steps if rows.tokens.shape[1] > 2]
    assert [len(rows.counts) for rows in chunks] == [1, 1, 1]
    assert sum(int(rows.counts.sum()) for rows in chunks) == 6 + 6 + 6


def test_prompts_alone_come_in_whole(model: Model, steps: list[Rows]) -> None:
    """Nobody decodes, nobody waits: no reason for small chunks."""
    run = Run(model, options_for("exact", chunk_tokens=10), gated(1, 150), GenerateOptions(max_new_tokens=2))
    run.submit(0)
    run.step()
    assert [rows.tokens.shape for rows in steps[:2]] == [(1, 150), (1, 150)]


def test_a_right_draft_saves_the_scaling_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of zeros: every draft comes true, and a token of all requests takes one step."""
    weights = {name: array * (not name.startswith("expert")) for name, array in tiny_weights(SMALL).items()}
    path = tiny_bundle(tmp_path / "b", SMALL, weights=weights, tokenizer=False, end=())
    with load(path, threads=1) as model:
        run = Run(model, options_for("paired"), gated(4), GenerateOptions(max_new_tokens=20))
        seen: list[int] = []
        step = model.session.step
        monkeypatch.setattr(model.session, "step", lambda rows: seen.append(len(rows.counts)) or step(rows))
        for number in range(4):
            run.submit(number)
        run.to_end()
    assert seen == [4, 4, 4, *[8] * 18, 4]


# --- memory ---------------------------------------------------------------------------------------


def test_requests_beyond_the_budget_wait_in_order(model: Model) -> None:
    slot = model.session.cache_bytes(1, 64)
    prompts = [*gated(3, 20), Routed([5] * 20, "math"), *gated(2, 20)]
    run = Run(model, options_for("exact", kv_budget=5 * slot), prompts, GenerateOptions(max_new_tokens=5))
    for number in range(6):
        run.submit(number)
    begun: list[int] = []
    while not run.scheduler.is_idle:
        for prompt in run.step():
            begun += [prompt] * (prompt not in begun)
        assert len(run.scheduler._running) <= 3
    assert begun == [0, 1, 2, 3, 4, 5], "the fourth would have fitted beside the first two, and waited for the third"


def test_what_can_never_fit_is_refused_at_once(model: Model) -> None:
    least = model.session.cache_bytes(2, 64)
    run = Run(model, options_for("exact", kv_budget=least - 1), gated(1, 20), GenerateOptions(max_new_tokens=5))
    message = (
        f"the request does not fit the K/V budget; got 24 tokens in 2 slots, {least} bytes; need at most {least - 1} "
        "bytes. Fix: a larger K/V budget, a shorter prompt or fewer new tokens"
    )
    with pytest.raises(InputError) as caught:
        run.submit(0)
    assert (str(caught.value), caught.value.code) == (message, "E_KV_BUDGET")
    assert run.scheduler.is_idle


def test_longer_slots_wait_for_room_beside_the_old_ones(model: Model) -> None:
    """Two short requests run in half the budget's slots; the long one needs slots of its length for all."""
    slot = model.session.cache_bytes(1, 64)
    prompts = [*gated(2, 20), Routed([3] * 100, "xlora")]
    for budget, waits in ((10 * slot, True), (40 * slot, False)):
        run = Run(model, options_for("exact", rows=3, kv_budget=budget), prompts, GenerateOptions(max_new_tokens=5))
        for number in range(3):
            run.submit(number)
        run.step()
        assert (run.scheduler.waiting == 1) is waits
        run.to_end()
        assert all(request.is_done for request in run.requests)


def test_running_requests_keep_their_entries_among_fewer_longer_slots(model: Model) -> None:
    """32 slots take most of the budget; beside them there is room for four of twice the length."""
    prompts, how = [*gated(1, 20), Routed([3] * 100, "xlora")], GenerateOptions(max_new_tokens=9)
    want = alone(model, prompts, how)
    run = Run(model, options_for("exact", kv_budget=40 * model.session.cache_bytes(1, 64)), prompts, how)
    with seen_logits() as seen:
        run.submit(0)
        run.step()
        assert len(model.session.lengths) == 32
        run.submit(1)
        run.step()
        assert len(model.session.lengths) == 4
        run.to_end()
    for number in want:
        Ties().compare(want[number], seen[number], "among fewer")


def test_a_full_slot_that_rides_along_has_room_for_the_padding(models: dict[CacheStyle, Model]) -> None:
    """Whole grains of entries, and drafts that come true in some rows while others catch up."""
    model, random = models[CacheStyle.ALIAS], np.random.default_rng(31)
    for length in (58, 59, 60):
        prompts = [Routed(random.integers(0, SMALL.vocab, length).tolist(), "xlora") for _ in range(12)]
        budget = 8 * model.session.cache_bytes(1, 65)  # no more than the slots need
        run = Run(model, options_for("paired", kv_budget=budget), prompts, GenerateOptions(max_new_tokens=65 - length))
        for number in range(len(prompts)):
            run.submit(number)
        run.to_end()  # each step looks at the memory
        assert sum(request.completion().timings.accepted for request in run.requests) > 0


def test_slots_shrink_once_the_longest_request_has_gone(model: Model) -> None:
    prompts = [Routed([3] * 150, "xlora"), *gated(1, 10)]
    run = Run(model, options_for("exact"), prompts, GenerateOptions(max_new_tokens=20))
    long, _ = run.submit(0), run.submit(1)
    run.step()
    much = run.scheduler.kv_bytes
    run.scheduler.cancel(long)
    run.step()
    assert run.scheduler.kv_bytes * 3 == much  # 192 entries, then 64
    run.to_end()


def live_bytes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What K/V arrays take at any moment, the old ones beside the new: now, and at most."""
    import weakref

    from runtime import caches

    count, zeros = {"now": 0, "most": 0}, np.zeros

    def freed(size: int) -> None:
        count["now"] -= size

    def counted(*args: Any) -> np.ndarray:
        array = zeros(*args)
        count["now"] += array.nbytes
        count["most"] = max(count.values())
        weakref.finalize(array, freed, array.nbytes)
        return array

    monkeypatch.setattr(caches, "np", type("Counted", (), {"zeros": staticmethod(counted), "ndarray": np.ndarray}))
    return count


def test_the_budget_holds_while_memory_is_copied(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of all lengths, as many as fit; every array of K/V is counted from its making to its end."""
    count, random = live_bytes(monkeypatch), np.random.default_rng(8)
    model.session.allocate(0)
    slot = model.session.cache_bytes(1, 64)
    prompts = asked(random, 30, 150)
    for budget in (8 * slot, 13 * slot, 60 * slot):
        count["now"] = count["most"] = 0
        model.session.allocate(0)
        run = Run(model, options_for("exact", kv_budget=budget), prompts, GenerateOptions(max_new_tokens=4))
        for number in range(len(prompts)):
            run.submit(number)
        run.to_end()
        assert all(request.is_done for request in run.requests)
        assert budget / 2 < count["most"] <= budget
        run.scheduler.close()
        assert (count["now"], run.scheduler.kv_bytes) == (0, 0)


def test_padding_that_a_graph_writes_stays_within_its_slot(models: dict[CacheStyle, Model]) -> None:
    """A short rest beside a long prompt would be padded past the capacity; apart they fit."""
    model = models[CacheStyle.ALIAS]
    prompts, how = [*gated(1), Routed([3] * 20, "xlora"), Routed([5] * 58, "xlora")], GenerateOptions(max_new_tokens=5)
    want = alone(model, prompts, how)
    run = Run(model, options_for("exact", chunk_tokens=8), prompts, how)
    with seen_logits() as seen:
        decodes = run.submit(0)
        run.step()
        short = run.submit(1)
        run.step()
        assert short.fed == 8
        run.scheduler.cancel(decodes)
        run.submit(2)
        run.to_end()  # each step looks at the memory
    for number in (1, 2):
        Ties().compare(want[number], seen[number], "padded")


def test_an_abandoned_stream_of_many_prompts_leaves_the_model_usable(model: Model) -> None:
    how = GenerateOptions(max_new_tokens=6, batch_size=2)
    want = [each.token_ids for each in complete(model, gated(4), how)]
    stream = generate(model, gated(4), how)
    next(stream)
    assert [each.token_ids for each in complete(model, gated(4), how)] == want
    with pytest.raises(InputError, match="another generation has begun on this model"):
        list(stream)
    assert [each.token_ids for each in complete(model, gated(4), how)] == want


def test_without_memory_for_one_the_others_go_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [*gated(1, 20), Routed([3] * 100, "xlora"), *gated(1, 20)]
    want = alone(model, prompts, GenerateOptions(max_new_tokens=6))
    run = Run(model, options_for("exact"), prompts, GenerateOptions(max_new_tokens=6))
    resize = model.session.resize

    def short(slots: int, capacity: int) -> None:
        if capacity > 64:
            raise MemoryError
        resize(slots, capacity)

    monkeypatch.setattr(model.session, "resize", short)
    with seen_logits() as seen:
        for number in range(3):
            run.submit(number)
        run.to_end()
    [failed] = run.scheduler.failed
    assert failed is run.tickets[1]
    assert str(failed.error).startswith("not enough memory for the K/V of a request")
    assert isinstance(failed.error, MachineError)
    for number in (0, 2):
        Ties().compare(want[number], seen[number], "beside")


# --- ends and faults ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("decode", MODES)
def test_bad_numbers_fail_their_request_alone(tmp_path: Path, style: CacheStyle, decode: str) -> None:
    """The embedding of one token is NaN; whoever is fed it fails, in its prompt or at a token of its own."""
    shape = dataclasses.replace(SMALL, cache=style)
    how = GenerateOptions(max_new_tokens=8, sampling=Sampling(1.1, seed=3), decode=decode)
    random = np.random.default_rng(11)
    prompts = asked(random, 12, 12)
    with load(tiny_bundle(tmp_path / "good", shape, tokenizer=False, end=()), threads=1) as model:
        want = [complete(model, [prompt], how)[0].token_ids for prompt in prompts]
    seen = [[*prompt.prompt, *tokens[:-1]] for prompt, tokens in zip(prompts, want, strict=True)]
    bad = min(range(SMALL.vocab), key=lambda token: abs(sum(token in text for text in seen) - 4))
    spoiled = [number for number, text in enumerate(seen) if bad in text]
    assert 0 < len(spoiled) < 8
    weights = tiny_weights(shape)
    weights["embed"][bad] = np.nan
    path = tiny_bundle(tmp_path / "bad", shape, weights=weights, tokenizer=False, end=())
    with load(path, threads=1) as model:
        run = Run(model, options_for(decode, rows=5, chunk_tokens=6), prompts, how)
        for number in range(len(prompts)):
            run.submit(number)
        run.to_end()
        assert sorted(ticket.request.number for ticket in run.scheduler.failed) == spoiled
        for number, ticket in enumerate(run.tickets):
            assert ticket is not None
            tokens = tuple(event.token_id for event in ticket.request.events)
            if number in spoiled:
                assert f"is not finite for prompt {number + 1} of the step" in str(ticket.error)
                assert tokens == want[number][: len(tokens)]
            else:
                assert (tokens, ticket.error) == (want[number], None)


@pytest.mark.parametrize("decode", ["exact", "paired"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, seed=4)])
def test_a_step_that_failed_can_be_repeated(
    model: Model, decode: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it failed: no token is lost or comes twice, and no random number is drawn twice."""
    prompts = [*gated(2), Routed([9] * 12, "math")]
    how = GenerateOptions(max_new_tokens=5, sampling=sampling, decode=decode)
    want = [complete(model, [prompt], how)[0].token_ids for prompt in prompts]
    step, fails, faults = model.session.step, 0, 1
    while faults:  # until the step to fail lies behind the last one
        fails += 1
        run, calls, faults = Run(model, options_for(decode, chunk_tokens=5), prompts, how), 0, 0

        def failing(rows: Rows, fails: int = fails) -> StepResult:
            nonlocal calls
            calls += 1
            if calls == fails:
                raise MachineError("not enough memory for this step")
            return step(rows)

        events: list[int] = []
        monkeypatch.setattr(model.session, "step", failing)
        for number in range(3):
            run.submit(number)
        while not run.scheduler.is_idle:
            try:
                events += run.step()
            except MachineError:
                faults += 1
        monkeypatch.setattr(model.session, "step", step)
        assert faults <= 1
        assert [events.count(number) for number in range(3)] == [5, 5, 5]
        assert [request.completion().token_ids for request in run.requests] == want, f"after a fault at step {fails}"
    assert fails > 6


def test_cancelled_requests_free_their_memory(model: Model) -> None:
    """One that decodes, one in its prompt, one that waits, one that has ended."""
    slot = model.session.cache_bytes(1, 64)
    prompts = [*gated(1), Routed([3] * 30, "xlora"), *gated(4)]
    options = options_for("exact", kv_budget=4 * slot, chunk_tokens=4)
    run = Run(model, options, prompts, GenerateOptions(max_new_tokens=9))
    decodes = run.submit(0)
    run.step()
    in_prompt, waits, _ = run.submit(1), run.submit(2), run.submit(3)
    run.step()
    assert (in_prompt.fed, run.scheduler.waiting) == (4, 2)
    for ticket in (in_prompt, waits):
        run.scheduler.cancel(ticket)
    assert run.scheduler.waiting == 1
    assert set(run.step()) == {0, 3}, "its slots are another one's at once"
    run.scheduler.cancel(decodes)
    run.submit(4)
    assert set(run.step()) == {3, 4}
    run.to_end()
    run.scheduler.cancel(run.tickets[4])  # type: ignore[arg-type]
    assert not run.tickets[4].is_cancelled  # type: ignore[union-attr]
    assert [len(request.events) for request in run.requests[1:5]] == [0, 0, 9, 9]


def test_whoever_loses_the_session_ends_with_an_error(model: Model) -> None:
    run = Run(model, options_for("exact"), gated(3), GenerateOptions(max_new_tokens=9))
    running = run.submit(0)
    run.step()
    complete(model, [[1, 2]], GenerateOptions(max_new_tokens=1))
    with pytest.raises(InputError, match="another generation has begun on this model"):
        run.scheduler.step()
    assert running.is_ended
    run.submit(1)
    run.to_end()
    assert len(run.requests[1].events) == 9, "whoever comes later begins anew"


def test_adapters_of_another_generation_wait_for_the_first_to_end(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has one stack: nobody of the first generation overtakes the second either."""
    monkeypatch.setattr("runtime.scheduler.stack_for", lambda session, adapters: adapters)
    given: list[object] = []
    allocate = model.session.allocate
    monkeypatch.setattr(
        model.session, "allocate", lambda slots, adapters=None: given.append(adapters) or allocate(slots)
    )
    run = Run(model, options_for("exact"), gated(4), GenerateOptions(max_new_tokens=3))
    old, new = object(), object()
    for number, stack in enumerate((old, old, new, old)):
        way = run.ways[number]
        run.tickets[number] = run.scheduler.submit(
            run.requests[number],
            way.route.routing,
            way.session,
            stack,  # type: ignore[arg-type]
        )
    order: list[int] = []
    while not run.scheduler.is_idle:
        order += run.step()
    assert order == [0, 1, 0, 1, 0, 1, 2, 2, 2, 3, 3, 3]
    changes = [now for before, now in zip([None, *given], given, strict=False) if now is not before]
    assert changes == [old, new, old, None]
    assert all(ticket.adapters is None for ticket in run.tickets if ticket), "nothing keeps an old generation"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 0}, "rows; got 0; need at least 1"),
        ({"kv_budget": 0}, "kv_budget; got 0; need at least 1"),
        ({"chunk_tokens": 0}, "chunk_tokens; got 0; need at least 1"),
        ({"decode": Decode(DecodeMode.FROZEN)}, "requests cannot come and go under decode frozen"),
    ],
)
def test_bad_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SchedulerOptions(**fields)


def test_a_graph_without_caches_is_refused(tmp_path: Path) -> None:
    shape = dataclasses.replace(SMALL, cache=CacheStyle.NONE)
    with load(tiny_bundle(tmp_path / "b", shape, tokenizer=False, end=()), threads=1) as model:
        run = Run(model, SchedulerOptions(), gated(1), GenerateOptions(max_new_tokens=3))
        with pytest.raises(InputError, match="cannot come and go in a graph without K/V cache"):
            run.submit(0)


# --- sessions of few rows, and the other backend --------------------------------------------------


def test_pairs_leave_room_for_both_passes(model: Model, steps: list[Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.session, "limits", StepLimits(positions=200, rows=4, decode_rows=5, tokens=3))
    for decode, most in (("paired", 2), ("auto", 4), ("exact", 4)):
        run = Run(model, options_for(decode), gated(6), GenerateOptions(max_new_tokens=6))
        for number in range(6):
            run.submit(number)
        steps.clear()
        while not run.scheduler.is_idle:
            run.step()
            assert len(run.scheduler._running) <= most
        assert max(len(rows.counts) for rows in steps) == 4
        assert max(rows.tokens.shape[1] for rows in steps) == 3
        assert any(request.completion().timings.drafts for request in run.requests) is (decode != "exact")


@pytest.mark.parametrize("style", STYLES)
def test_a_gpu_session_gives_the_same(style: CacheStyle, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's session on the fake GPU: slots are moved and resized there."""
    trt = fake_tensorrt.install(monkeypatch)
    shape, weights = dataclasses.replace(SMALL, cache=style), tiny_weights(SMALL)
    random, ties = np.random.default_rng(21), Ties()
    session = fake_tensorrt.open_fake(shape, weights)
    routings = [Routing(np.tile(np.float32(row), (shape.blocks, 1)), is_gated=row == SCALING_PASS)
                for row in (SCALING_PASS, SCALING_PASS, (0, 1, 0))]  # fmt: skip
    chosen = [routings[int(random.integers(3))] for _ in range(10)]
    prompts = [random.integers(0, shape.vocab, int(random.integers(1, 90))).tolist() for _ in chosen]

    def request(number: int) -> Request:
        return Request(number, prompts[number], Limits(7, frozenset(), ()), Sampler(Sampling()), None)

    want, got = {}, {}
    for rows, found in ((1, want), (4, got)):
        options = options_for("exact" if rows == 1 else "paired", rows=rows, chunk_tokens=8)
        scheduler = Scheduler(Turn(), options)
        with seen_logits() as seen:
            for number, routing in enumerate(chosen):
                scheduler.submit(request(number), routing, session)
                scheduler.step()
            while not scheduler.is_idle:
                scheduler.step()
        found |= seen
        scheduler.close()
    for number, prompt in enumerate(prompts):
        ties.compare(want[number], got[number], f"prompt {number}")
        if chosen[number].is_gated:
            first = reference_exact(shape, weights, prompt, SCALING_PASS)[-1]
            np.testing.assert_allclose(want[number][0], first, atol=1e-4)
    ties.check()
    session.close()
    assert not trt.driver.leaks


# --- more prompts than rows -----------------------------------------------------------------------


def test_generate_gives_a_free_row_to_the_next_prompt(model: Model, steps: list[Rows]) -> None:
    """Prompts of very different lengths: as one ends the next begins, in fewer steps than batch after batch."""
    prompts, lengths = gated(8), (30, 2, 2, 2, 2, 2, 2, 30)
    how = GenerateOptions(max_new_tokens=30, batch_size=2, decode="exact")
    free = [complete(model, [prompt], how)[0].token_ids for prompt in prompts]
    stop = tuple({tokens[2] for tokens in free[1:7]} - set(free[0]))
    assert len(stop) > 2
    how = dataclasses.replace(how, stop_token_ids=stop)
    want = [complete(model, [prompt], how)[0] for prompt in prompts]
    assert len({len(each.token_ids) for each in want}) > 2
    steps.clear()
    got = complete(model, prompts, how)
    assert [(each.token_ids, each.finish_reason) for each in got] == [(w.token_ids, w.finish_reason) for w in want]
    batches = sum(2 * max(len(want[n].token_ids), len(want[n + 1].token_ids)) for n in range(0, 8, 2))
    assert sum(rows.tokens.shape[1] == 1 for rows in steps) < batches - 8
    assert len(lengths) == len(prompts)


def test_generate_keeps_to_its_budget(model: Model) -> None:
    slot = model.session.cache_bytes(1, 64)
    how = GenerateOptions(max_new_tokens=5, kv_budget=4 * slot)
    prompts = [*gated(5, 10), Routed([2] * 10, "plain")]  # one of another graph, in a session of its own
    free = [each.token_ids for each in complete(model, prompts, dataclasses.replace(how, kv_budget=None))]
    most, order = 0, []
    for event in generate(model, prompts, how):
        most = max(most, held_bytes(model))
        order.append(event.prompt)
    assert 0 < most <= 4 * slot
    assert order[:4] == [0, 1, 0, 1]
    assert [each.token_ids for each in complete(model, prompts, how)] == free
    with pytest.raises(
        InputError, match="prompt 2: the request does not fit the K/V budget; got 174 tokens in 2 slots"
    ):
        generate(model, [*gated(1, 10), *gated(1, 170)], how)


def test_generate_names_the_prompt_with_bad_numbers(tmp_path: Path) -> None:
    weights = tiny_weights(SMALL)
    weights["embed"][39] = np.nan
    path = tiny_bundle(tmp_path / "b", SMALL, weights=weights, tokenizer=False, end=())
    with load(path, threads=1) as model:
        how = GenerateOptions(max_new_tokens=1, batch_size=2)
        with pytest.raises(NumericError, match="is not finite for prompt 4 of the step") as caught:
            complete(model, [[1], [2], [3], [39], [4]], how)
        assert caught.value.rows == (4,)


def test_ways_that_are_not_scheduled_know_no_budget() -> None:
    with pytest.raises(InputError, match="decode frozen knows no K/V budget"):
        GenerateOptions(decode="frozen", kv_budget=1 << 20)
    with pytest.raises(InputError, match="kv_budget; got 0; need at least 1"):
        GenerateOptions(kv_budget=0)


# --- the numbers of steps are those of the session ------------------------------------------------


@pytest.mark.parametrize("decode", MODES)
@pytest.mark.parametrize("way", ["batch", "scheduler", "budget", "serving"])
def test_whatever_runs_a_request_counts_its_steps(model: Model, steps: list[Rows], decode: str, way: str) -> None:
    """All prompts are there at once and end together: each has seen all steps of the session, and so in any way."""
    prompts, how = gated(3), GenerateOptions(max_new_tokens=6, decode=decode)
    if way == "serving":
        with Serving(model, options_for(decode, rows=3)) as serving:
            found = [serving.submit(prompts[0], GenerateOptions(max_new_tokens=6)).completion(60)]
    else:
        others = {"batch": {}, "scheduler": {"batch_size": 2}, "budget": {"kv_budget": 1 << 30}}[way]
        found = complete(model, prompts, dataclasses.replace(how, **others))
    counts = [(each.timings.steps, each.timings.exact_steps) for each in found]
    assert max(taken for taken, _ in counts) <= len(steps)
    assert all(taken > 0 and exact >= 12 for taken, exact in counts)  # prefill, then five tokens, two passes each
    if way != "scheduler":
        assert {taken for taken, _ in counts} == {len(steps)}
    if decode == "exact":
        assert all(taken == exact for taken, exact in counts)


def test_a_request_that_waited_counts_its_own_steps(model: Model, steps: list[Rows]) -> None:
    """One row at a time: together they have taken all steps, none twice."""
    how = GenerateOptions(
        max_new_tokens=5, batch_size=2, kv_budget=2 * model.session.cache_bytes(1, 64), decode="exact"
    )
    found = complete(model, [*gated(3), Routed([3] * 4, "math")], how)
    assert sum(each.timings.steps for each in found) == len(steps) == sum(each.timings.exact_steps for each in found)
    assert [each.timings.steps for each in found] == [10, 10, 10, 5]
