"""Drafts and sampling: whatever is drafted, tokens are distributed as without drafts; broken rules are found out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count, product

import numpy as np
import pytest

from runtime import GenerateOptions, Model, Sampling, complete, load, sampling
from runtime.sampling import Draft, Kept, Sampler, accept_or_redraw, distribution, softmax
from tests.runtime.tiny_bundles import SCALING_PASS, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, reference_exact, tiny_weights

Rule = Callable[[Kept, Kept, int, np.random.Generator], int]


def accept_always(target: Kept, drawn_from: Kept, drafted: int, random: np.random.Generator) -> int:
    """A broken rule: tokens are the draft's."""
    return drafted


def forget_the_residual(target: Kept, drawn_from: Kept, drafted: int, random: np.random.Generator) -> int:
    """A broken rule: what was refused may be drawn again."""
    one = np.array([drafted])
    if random.random() * drawn_from.of(one)[0] < target.of(one)[0]:
        return drafted
    return target.pick(random.random())


BROKEN = [accept_always, forget_the_residual]


def excess(counts: Mapping[object, int], expected: Mapping[object, float]) -> float:
    """Pearson's statistic as standard deviations of a normal (Wilson and Hilferty 1931); rare cells are one cell."""
    total = sum(counts.values())
    rare = {cell for cell, share in expected.items() if share * total < 10}
    cells = {cell: (counts.get(cell, 0), share * total) for cell, share in expected.items() if cell not in rare}
    cells["rare"] = (total - sum(seen for seen, _ in cells.values()), total - sum(want for _, want in cells.values()))
    if cells["rare"][1] < 10:
        if cells["rare"][0] > 60:
            return float("inf")
        del cells["rare"]
    statistic = sum((seen - want) ** 2 / want for seen, want in cells.values())
    free = len(cells) - 1
    return float(((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / np.sqrt(2 / (9 * free)))


ACCEPTED, REFUSED = 4.5, 10.0  # standard deviations: of a right rule, of a broken one


def kept_of(probabilities: list[float]) -> Kept:
    ids = np.argsort(-np.array(probabilities), kind="stable")
    ids = ids[np.array(probabilities)[ids] > 0]
    return Kept(ids, np.array(probabilities)[ids])


PAIRS = [  # p, q
    ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]),
    ([0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]),
    ([0.5, 0.5, 0.0, 0.0], [0.0, 0.4, 0.3, 0.3]),  # other tokens are kept
    ([0.3, 0.3, 0.2, 0.2], [0.9, 0.1, 0.0, 0.0]),
]


def drawn(rule: Rule, p: list[float], q: list[float], draws: int = 20_000) -> float:
    random = np.random.default_rng(5)
    target, drawn_from = kept_of(p), kept_of(q)
    seen = Counter(rule(target, drawn_from, drawn_from.pick(random.random()), random) for _ in range(draws))
    return excess(seen, dict(enumerate(p)))


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_the_rule_gives_the_target_distribution(p: list[float], q: list[float]) -> None:
    assert drawn(accept_or_redraw, p, q) < ACCEPTED
    for broken in BROKEN:
        assert drawn(broken, p, q) > REFUSED


def test_the_share_of_accepted_drafts_is_what_the_distributions_share() -> None:
    p, q = PAIRS[0]
    random = np.random.default_rng(6)
    target, drawn_from = kept_of(p), kept_of(q)
    hits = 0
    for _ in range(20_000):
        drafted = drawn_from.pick(random.random())
        hits += accept_or_redraw(target, drawn_from, drafted, random) == drafted
    assert hits / 20_000 == pytest.approx(sum(map(min, p, q)), abs=0.015)


def test_equal_distributions_accept_every_draft() -> None:
    random = np.random.default_rng(7)
    same = distribution(np.float32([0.3, 1.0, -2.0, 0.7]), Sampling(0.9, top_p=0.9))
    for _ in range(2_000):
        drafted = same.pick(random.random())
        assert accept_or_redraw(same, same, drafted, random) == drafted


def test_distributions_that_differ_by_rounding_only_are_drawn_from() -> None:
    """The residual is empty, and the draft is one that the target does not keep."""
    target, drawn_from = Kept(np.array([1]), np.array([1.0])), Kept(np.array([1, 2]), np.array([1.0, 1e-17]))
    with np.errstate(all="raise"):
        assert accept_or_redraw(target, drawn_from, 2, np.random.default_rng(0)) == 1


def test_drafts_are_drawn_as_the_sampler_draws() -> None:
    """Temperature, top-k and top-p count for the draft, too."""
    logits = np.float32([1.0, 0.5, 0.0, -4.0])
    sampler = Sampler(Sampling(0.7, top_k=3, seed=2))
    drafts = [sampler.draft(logits) for _ in range(10_000)]
    share = softmax(logits[:3], 0.7)
    assert excess(Counter(draft.token_id for draft in drafts), dict(enumerate(share))) < ACCEPTED
    assert {len(draft.drawn_from.ids) for draft in drafts if draft.drawn_from} == {3}


def test_a_greedy_draft_is_the_likeliest_and_changes_nothing() -> None:
    sampler = Sampler(Sampling())
    assert sampler.draft(np.float32([0, 2, 1])) == Draft(1, None)
    assert sampler.choose(np.float32([0, 1, 2]), Draft(1, None)) == 2


# --- whole generations ----------------------------------------------------------------------------

SHAPE = TinyShape(vocab=4, hidden=12, experts=3)
WEIGHTS = tiny_weights(SHAPE, seed=5)
PROMPT, WARM, GENERATIONS = [1, 3], Sampling(1.3), 6_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    with load(tiny_bundle(folder, SHAPE, weights=WEIGHTS, tokenizer=False, end=()), threads=1) as model:
        yield model


def histories(warm: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of each first three tokens, by recomputing both passes over the whole sequence."""
    found = {}
    for tokens in product(range(SHAPE.vocab), repeat=3):
        logits = reference_exact(SHAPE, WEIGHTS, [*PROMPT, *tokens[:2]], SCALING_PASS)[1:]
        each = [distribution(row, warm).of(np.array([token]))[0] for row, token in zip(logits, tokens, strict=True)]
        found[tokens] = float(np.prod(each))
    assert sum(found.values()) == pytest.approx(1)
    return found


def generated(model: Model, decode: str, monkeypatch: pytest.MonkeyPatch, warm: Sampling = WARM) -> tuple[float, float]:
    """How far the first three tokens of many generations are from what they should be; and accepted drafts."""
    seeds, [*likely] = count(1), max((share, tokens) for tokens, share in histories(warm).items())[1]
    monkeypatch.setattr(
        "runtime.request.looked_up",
        lambda text, most: [*likely, 0][len(text) - len(PROMPT) :][:most],  # else hardly a draft comes true
    )
    seeded = lambda given: Sampler(dataclasses.replace(given, seed=next(seeds)))  # noqa: E731
    monkeypatch.setattr("runtime.prompts.Sampler", seeded)
    options = GenerateOptions(max_new_tokens=4, sampling=warm, batch_size=500, decode=decode)  # the 4th is not drafted
    found = complete(model, [PROMPT] * GENERATIONS, options)
    drafts, accepted = (sum(getattr(each.timings, name) for each in found) for name in ("drafts", "accepted"))
    assert drafts == 2 * GENERATIONS if decode in ("paired", "auto") else (drafts > 0) is (decode != "exact")
    return excess(Counter(each.token_ids[:3] for each in found), histories(warm)), accepted / max(drafts, 1)


@pytest.mark.parametrize("decode", ["exact", "paired", "auto", "paired:2", "lookup:3"])
def test_whole_generations_are_distributed_as_in_exact(
    model: Model, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, accepted = generated(model, decode, monkeypatch)
    assert far < ACCEPTED
    assert decode == "exact" or 0.2 < accepted < 0.9  # both ways of the rule were taken


def test_kept_sets_that_differ_make_no_difference(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generated(model, "paired", monkeypatch, Sampling(1.3, top_k=3, top_p=0.9))[0] < ACCEPTED


@pytest.mark.parametrize(
    ("broken", "decode"), [*((rule, "paired") for rule in BROKEN), (BROKEN[0], "paired:2"), (BROKEN[1], "lookup:3")]
)
def test_broken_rules_are_found_in_whole_generations(
    model: Model, broken: Rule, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "accept_or_redraw", broken)
    assert generated(model, decode, monkeypatch)[0] > REFUSED


@pytest.mark.parametrize("decode", ["paired:3", "lookup:3"])
def test_a_seed_gives_the_same_tokens_in_any_batch(model: Model, decode: str) -> None:
    prompts = [[1, 3], [2], [0, 1, 2, 3, 0], [3, 3, 1]]
    options = GenerateOptions(max_new_tokens=25, sampling=Sampling(1.0, seed=8), decode=decode)
    want = [complete(model, [prompt], options)[0] for prompt in prompts]
    assert len({each.token_ids for each in want}) == 4
    assert all(0 < each.timings.accepted < each.timings.drafts for each in want)
    assert [each.token_ids for each in complete(model, prompts, options)] == [each.token_ids for each in want]


def test_a_seed_gives_the_same_tokens_in_any_batch_and_at_any_pace(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` runs drafts or not by the clock; what a seed gives may not depend on it."""
    prompts = [[1, 3], [2], [0, 1, 2, 3, 0], [3, 3, 1]]
    options = GenerateOptions(max_new_tokens=25, sampling=Sampling(1.0, seed=8), decode="paired")
    want = [complete(model, [prompt], options)[0].token_ids for prompt in prompts]
    assert len(set(want)) == 4
    for decode, random in (("paired", None), ("auto", 1), ("auto", 2)):
        if random is not None:
            flips = np.random.default_rng(random)
            monkeypatch.setattr("runtime.pace.Pace.drafts", lambda self, rows, f=flips: bool(f.integers(2)))
        found = complete(model, prompts, dataclasses.replace(options, decode=decode))
        assert [each.token_ids for each in found] == want
    exact = [each.token_ids for each in complete(model, prompts, dataclasses.replace(options, decode="exact"))]
    assert exact == [complete(model, [p], dataclasses.replace(options, decode="exact"))[0].token_ids for p in prompts]
