"""Generation on the tiny decoder against plain numpy that recomputes both passes over the whole sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Completion, GenerateOptions, InputError, Model, NumericError, Sampling, complete, load
from runtime.generate import generate
from runtime.passes import ExactPasses, InChunks
from runtime.request import FinishReason
from runtime.routing import routing_for
from runtime.rows import Rows
from runtime.signature import CacheStyle
from runtime.text import Text
from tests.runtime.tiny_bundles import BYTE_SHAPE, END, SCALING_PASS, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, reference, reference_exact, tiny_weights

WEIGHTS = tiny_weights(BYTE_SHAPE)
PROMPTS: list[str | Sequence[int]] = ["hello", [5, 17, 3], "日", "a longer prompt than the others, by far"]
GREEDY = GenerateOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", end=())


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with load(bundle, threads=1) as model:
        yield model


def ids_of(model: Model, prompt: str | Sequence[int]) -> list[int]:
    assert model.text is not None
    return model.text.encode(prompt) if isinstance(prompt, str) else list(prompt)


def greedy_reference(prompt: list[int], count: int, logits_of: Any) -> list[int]:
    """Greedy decoding by whole-sequence recomputation."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(ids)[-1].argmax()))
    return ids[len(prompt) :]


def exact_logits(ids: list[int]) -> np.ndarray:
    return reference_exact(BYTE_SHAPE, WEIGHTS, ids, SCALING_PASS)


def fixed_logits(row: Sequence[float], ids: list[int]) -> np.ndarray:
    scalings = np.broadcast_to(np.float32(row), (len(ids), BYTE_SHAPE.blocks, BYTE_SHAPE.experts))
    return reference(BYTE_SHAPE, WEIGHTS, ids, scalings)[0]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


def test_cached_two_pass_decoding_equals_the_whole_sequence_twice(model: Model) -> None:
    want = [greedy_reference(ids_of(model, prompt), 12, exact_logits) for prompt in PROMPTS]
    assert tokens(complete(model, PROMPTS, GREEDY)) == want


def test_the_scaling_pass_the_gate_and_each_expert_change_the_tokens(model: Model) -> None:
    """Otherwise the test above would prove little."""
    prompt = ids_of(model, PROMPTS[3])
    want = greedy_reference(prompt, 12, exact_logits)
    wrong_scaling_pass = greedy_reference(prompt, 12, lambda ids: reference_exact(BYTE_SHAPE, WEIGHTS, ids, (0, 0, 0)))
    assert wrong_scaling_pass != want
    for dropped in range(BYTE_SHAPE.experts):
        weights = {n: a * (not n.startswith("expert") or not n.endswith(str(dropped))) for n, a in WEIGHTS.items()}
        without = greedy_reference(prompt, 12, lambda ids, w=weights: reference_exact(BYTE_SHAPE, w, ids, SCALING_PASS))
        assert without != want


def test_a_batch_gives_each_row_what_it_gets_alone(model: Model) -> None:
    alone = [complete(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert tokens(complete(model, PROMPTS, GREEDY)) == tokens(alone)
    assert tokens(complete(model, PROMPTS, dataclasses.replace(GREEDY, batch_size=3))) == tokens(alone)


@pytest.mark.parametrize(
    ("mix", "row"), [({"code": 1.0}, (0, 1, 0)), ({"lyrics": 0.3, "math": 0.7}, (0.7, 0, 0.3)), ({}, (0, 0, 0))]
)
def test_a_mix_is_one_pass_under_constant_scalings(
    model: Model, mix: dict[str, float], row: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Rows] = []
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda rows: steps.append(rows) or step(rows))
    want = [greedy_reference(ids_of(model, prompt), 8, lambda ids: fixed_logits(row, ids)) for prompt in PROMPTS]
    assert tokens(complete(model, PROMPTS, GenerateOptions(max_new_tokens=8, mix=mix))) == want
    assert len(steps) == 8


def test_the_static_graph_takes_no_scalings(bundle: Path) -> None:
    with load(bundle, graph="static", threads=1) as model:
        assert model.graph.name == "plain"
        want = greedy_reference(ids_of(model, PROMPTS[0]), 8, lambda ids: fixed_logits((0, 0, 0), ids))
        assert tokens(complete(model, PROMPTS[:1], GenerateOptions(max_new_tokens=8))) == [want]
        with pytest.raises(InputError, match="graph plain: this graph has its mix built in; got a mix"):
            complete(model, PROMPTS, GenerateOptions(mix={"math": 1.0}))


@pytest.mark.parametrize("per_length", [False, True])
def test_without_caches_the_whole_sequence_is_fed_again(tmp_path: Path, per_length: bool) -> None:
    shape = dataclasses.replace(BYTE_SHAPE, cache=CacheStyle.NONE)

    def logits(ids: list[int]) -> np.ndarray:
        row = np.float32(SCALING_PASS) / (len(ids) if per_length else 1)
        return reference_exact(shape, WEIGHTS, ids, row)

    with load(tiny_bundle(tmp_path / "b", shape, weights=WEIGHTS, per_length=per_length, end=()), threads=1) as model:
        want = [greedy_reference(ids_of(model, prompt), 6, logits) for prompt in PROMPTS]
        assert tokens(complete(model, PROMPTS, GenerateOptions(max_new_tokens=6))) == want
        with pytest.raises(InputError, match=r"this graph keeps no K/V cache; got kv_budget\. Fix: leave it out"):
            complete(model, PROMPTS, GenerateOptions(kv_budget=1 << 30))


def test_a_row_that_depends_on_the_length_is_refused_with_a_cache(tmp_path: Path) -> None:
    with (
        load(tiny_bundle(tmp_path / "b", per_length=True)) as model,
        pytest.raises(InputError, match=r"which a K/V cache cannot follow\. Fix: build with --cache none"),
    ):
        complete(model, PROMPTS)


def test_the_only_expert_needs_no_mix(tmp_path: Path) -> None:
    shape = TinyShape(vocab=300, hidden=16, experts=1, gate=False)
    weights = tiny_weights(shape)

    def logits(ids: list[int]) -> np.ndarray:
        return reference(shape, weights, ids, np.ones((len(ids), shape.blocks, 1), np.float32))[0]

    with load(tiny_bundle(tmp_path / "b", shape, end=()), threads=1) as model:
        want = greedy_reference([1, 2], 6, logits)
        assert tokens(complete(model, [[1, 2]], GenerateOptions(max_new_tokens=6))) == [want]


def test_several_experts_without_a_gate_ask_for_a_mix(tmp_path: Path) -> None:
    with load(tiny_bundle(tmp_path / "b", dataclasses.replace(BYTE_SHAPE, gate=False))) as model:
        with pytest.raises(InputError) as caught:
            generate(model, ["a"])
        assert str(caught.value) == (
            "this bundle has several experts and no gate: say how to mix them; got no mix; "
            "need weights for some of: math, code, lyrics. Fix: --mix math=0.33,code=0.33,lyrics=0.33"
        )
        assert complete(model, ["a"], GenerateOptions(max_new_tokens=1, mix={"math": 1.0}))


# --- ends ----------------------------------------------------------------------------------------


def test_an_end_token_ends_its_row_only(bundle: Path, tmp_path: Path) -> None:
    """Whatever token a row gives at some place is made the end token; other rows go on as before."""
    with load(bundle, threads=1) as model:
        free = tokens(complete(model, PROMPTS, GREEDY))
    end = free[0][4]
    with load(tiny_bundle(tmp_path / "b", end=(END, end)), threads=1) as model:
        ended = complete(model, PROMPTS, GREEDY)
        by_option = complete(model, PROMPTS, dataclasses.replace(GREEDY, stop_token_ids=(free[3][2],)))
    for completion, whole in zip(ended, free, strict=True):
        cut = whole[: whole.index(end) + 1] if end in whole else whole
        assert list(completion.token_ids) == cut
        assert completion.finish_reason == ("stop" if end in whole else "length")
        assert completion.text == model_text(bundle, cut[:-1] if end in whole else cut)
    assert len(ended[0].token_ids) <= 5
    assert len(by_option[3].token_ids) <= 3


def model_text(bundle: Path, ids: list[int]) -> str:
    return Text(bundle / "tokenizer" / "tokenizer.json").decode(ids)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stop_string_across_tokens_ends_before_it(model: Model, prompt: str | list[int]) -> None:
    options = GenerateOptions(max_new_tokens=60)
    [free] = complete(model, [prompt], options)
    assert len(free.text) > 12
    for start in range(0, 8, 2):
        stop = free.text[start : start + 4]
        [ended] = complete(model, [prompt], dataclasses.replace(options, stop=(stop,)))
        assert ended.text == free.text[: free.text.index(stop)]
        assert ended.finish_reason is FinishReason.STOP
        assert len(ended.token_ids) < len(free.token_ids)
        assert free.token_ids[: len(ended.token_ids)] == ended.token_ids


def test_a_stop_string_that_does_not_come_changes_nothing(model: Model) -> None:
    free = complete(model, PROMPTS, GREEDY)
    held = complete(model, PROMPTS, dataclasses.replace(GREEDY, stop=(free[0].text + "~", "no such text")))
    assert [c.text for c in held] == [c.text for c in free]
    assert {c.finish_reason for c in held} == {FinishReason.LENGTH}


def test_streamed_events_add_up_to_the_completions(model: Model) -> None:
    options = GenerateOptions(max_new_tokens=40)
    completions = complete(model, PROMPTS, options)
    events = list(generate(model, PROMPTS, options))
    assert model.text is not None
    for number, completion in enumerate(completions):
        mine = [event for event in events if event.prompt == number]
        assert tuple(event.token_id for event in mine) == completion.token_ids
        assert "".join(event.text for event in mine) == completion.text == model.text.decode(completion.token_ids)
        assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == completion.finish_reason
    assert [event.prompt for event in events[:5]] == [0, 1, 2, 3, 0]  # rows advance together


def test_timings_count_tokens_and_seconds(model: Model) -> None:
    [short, long] = complete(model, [[1, 2], [1, 2, 3]], GREEDY)
    assert (short.timings.prompt_tokens, long.timings.prompt_tokens) == (2, 3)
    assert short.timings.new_tokens == 12
    assert 0 < short.timings.first_token_seconds < short.timings.total_seconds


# --- limits --------------------------------------------------------------------------------------


def test_generation_may_fill_all_positions_and_one_more_token(model: Model) -> None:
    prompt = [3] * 190
    [full] = complete(model, [prompt], GenerateOptions(max_new_tokens=11))
    assert len(full.token_ids) == 11
    [default] = complete(model, [prompt])
    assert default.token_ids == full.token_ids  # 128 would not fit
    with pytest.raises(InputError, match=r"190 prompt tokens and 12 new ones; need prompt \+ new tokens <= 201"):
        complete(model, [prompt], GenerateOptions(max_new_tokens=12))
    with pytest.raises(InputError, match="got 201 prompt tokens; need"):
        generate(model, [[3] * 201])  # refused by the call, before the first event is asked for


def test_a_finished_row_takes_no_more_positions(model: Model) -> None:
    [full, other] = complete(model, [[3] * 198, [1]])
    assert (len(full.token_ids), len(other.token_ids)) == (3, 128)
    assert other.token_ids == complete(model, [[1]])[0].token_ids


def test_the_default_is_128_tokens(model: Model) -> None:
    [completion] = complete(model, ["a"])
    assert len(completion.token_ids) == 128


def test_all_bad_prompts_are_reported_together(model: Model) -> None:
    with pytest.raises(InputError, match="3 problems") as caught:
        generate(model, ["fine", "", [5, 300, -1], []])
    text = str(caught.value)
    assert "prompt 2: the prompt is empty" in text
    assert "prompt 3: unknown token ids; got [300, -1]; need 0..299" in text
    assert "prompt 4: the prompt is empty" in text


def test_one_string_is_not_a_list_of_prompts(model: Model) -> None:
    with pytest.raises(InputError, match="got one string; need a list of prompts"):
        complete(model, "hello")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens; got 0; need at least 1"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"batch_size": 0}, "batch_size; got 0"),
    ],
)
def test_bad_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateOptions(**fields)


def test_without_a_tokenizer_only_ids_work(tmp_path: Path) -> None:
    with load(tiny_bundle(tmp_path / "b", tokenizer=False)) as model:
        with pytest.raises(InputError, match="prompt 1: this bundle has no tokenizer; got text; need token ids"):
            complete(model, ["a"])
        with pytest.raises(InputError, match="stop strings need a tokenizer"):
            complete(model, [[1]], GenerateOptions(stop=("x",)))
        [completion] = complete(model, [[1]], GenerateOptions(max_new_tokens=3))
        assert len(completion.token_ids) == 3
        assert completion.text == ""


def test_a_graph_is_picked_by_name_or_mode(bundle: Path) -> None:
    for wanted, name in ((None, "dynamic"), ("dynamic", "dynamic"), ("static", "plain"), ("plain", "plain")):
        with load(bundle, graph=wanted, backend="null") as model:
            assert model.graph.name == name
    with pytest.raises(InputError, match=r"no graph 'other'; need one of: plain \(static\), dynamic \(dynamic\)"):
        load(bundle, graph="other")


def test_unknown_backends_and_thread_counts_are_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match="no such backend; got 'trt9'; need null or ort"):
        load(bundle, backend="trt9")
    with pytest.raises(InputError, match="threads; got 0; need at least 1"):
        load(bundle, threads=0)


# --- sampling ------------------------------------------------------------------------------------

WARM = GenerateOptions(max_new_tokens=15, sampling=Sampling(1.5, seed=11))


def test_samples_repeat_with_their_seed_and_do_not_depend_on_the_batch(model: Model) -> None:
    batch = tokens(complete(model, PROMPTS, WARM))
    alone = [tokens(complete(model, [prompt], WARM))[0] for prompt in reversed(PROMPTS)]
    assert batch == alone[::-1]
    assert batch != tokens(complete(model, PROMPTS, GREEDY))
    assert batch != tokens(complete(model, PROMPTS, dataclasses.replace(WARM, sampling=Sampling(1.5, seed=12))))


def test_without_a_seed_equal_prompts_differ(model: Model) -> None:
    first, second = tokens(complete(model, ["a", "a"], GenerateOptions(max_new_tokens=20, sampling=Sampling(2.0))))
    assert first != second


def test_a_cold_temperature_and_top_k_of_one_are_greedy(model: Model) -> None:
    want = tokens(complete(model, PROMPTS, GREEDY))
    for sampling in (Sampling(1e-6), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9)):
        assert tokens(complete(model, PROMPTS, dataclasses.replace(GREEDY, sampling=sampling))) == want


# --- bad numbers ---------------------------------------------------------------------------------


def test_nan_is_never_streamed_as_text(tmp_path: Path) -> None:
    """The embedding of one token is NaN: generation ends with an error when it is fed, nothing comes after."""
    with load(tiny_bundle(tmp_path / "good", end=()), threads=1) as model:
        [good] = complete(model, ["hello"], GREEDY)
    poisoned = next(
        n for n, token in enumerate(good.token_ids) if token not in (*b"hello",) and token != good.token_ids[0]
    )
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    weights["embed"][good.token_ids[poisoned]] = np.nan
    with load(tiny_bundle(tmp_path / "bad", weights=weights, end=()), threads=1) as model:
        events = []
        with pytest.raises(NumericError, match="is not finite for prompt 1 of the step"):
            events.extend(generate(model, ["hello"], GREEDY))  # keeps what came before the error
        assert [event.token_id for event in events] == list(good.token_ids[: poisoned + 1])
        healthy = [id for id in range(200, 210) if id != good.token_ids[poisoned]]
        [after] = complete(model, [healthy], GenerateOptions(max_new_tokens=1))  # the session is not poisoned
        assert list(after.token_ids) == greedy_reference(healthy, 1, exact_logits)


def test_an_abandoned_stream_leaves_the_model_usable(model: Model) -> None:
    want = tokens(complete(model, PROMPTS, GREEDY))
    stream = generate(model, PROMPTS[:1], GREEDY)
    next(stream)
    assert tokens(complete(model, PROMPTS, GREEDY)) == want
    with pytest.raises(InputError, match="another generation has begun on this model"):
        next(stream)  # its caches are gone; it must not go on with those of the other


@pytest.mark.parametrize("size", [1, 3, 4])
def test_prompts_in_chunks_give_the_logits_of_one_go(model: Model, size: int) -> None:
    """Rows that end in different chunks, some exactly at a border."""
    counts = np.array([7, 3, 4, 1])
    ids = np.random.default_rng(3).integers(0, model.vocab_size, (4, 7))
    gate, code = (routing_for(model.manifest, model.graph, mix) for mix in (None, {"code": 1.0}))
    routings = [code, gate, code, gate]
    whole = ExactPasses(model.session, routings).forward(ids, counts)
    in_chunks = InChunks(ExactPasses(model.session, routings), size).forward(ids, counts)
    np.testing.assert_allclose(in_chunks, whole, atol=1e-4)  # logits up to 14, sums in another order
    assert np.abs(whole[0] - whole[1]).max() > 0.1
