"""Variants of one bundle: rows of different ones in a batch get what each gets alone; static ones come in order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import GenerateOptions, InputError, Model, NumericError, Routed, Sampling, complete, load
from runtime.backends.ort import OrtSession
from runtime.bundle import read_manifest
from runtime.cli import main
from runtime.generate import generate
from runtime.manifest import MixInfo, VariantInfo, VariantKind
from runtime.mix_file import MixFile, write_mix
from runtime.rows import Rows
from runtime.sealed_folder import manifest_bytes
from runtime.signature import CacheStyle
from tests.runtime.bundle_makers import artifacts_of, bundle_files, make_bundle, make_manifest
from tests.runtime.tiny_bundles import BYTE_SHAPE, SCALING_PASS, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, reference, reference_exact, tiny_weights
from tests.same_tokens import Ties, greedy_ids, seen_logits

WEIGHTS = tiny_weights(BYTE_SHAPE)
UNEVEN = MixInfo(weights={"math": 0.9}, sites={"blocks.1.mlp": {"code": -0.6, "lyrics": 1.1}})
MIXES = {"warm": MixInfo(weights={"math": 0.7, "lyrics": 0.3}), "uneven": UNEVEN}
FOLDED = {"solo": {"code": 1.0}, "blend": {"math": 0.5, "lyrics": 0.5}}
ROWS = {  # [G, E] of the variants that are rows; xlora has none
    "base": [[0, 0, 0]] * 2,
    "math": [[1, 0, 0]] * 2,
    "code": [[0, 1, 0]] * 2,
    "lyrics": [[0, 0, 1]] * 2,
    "warm": [[0.7, 0, 0.3]] * 2,
    "uneven": [[0.9, 0, 0], [0, -0.6, 1.1]],
    "plain": [[0, 0, 0]] * 2,
    "solo": [[0, 1, 0]] * 2,
    "blend": [[0.5, 0, 0.5]] * 2,
}
SCALED = ("base", "math", "code", "lyrics", "warm", "uneven", "xlora")  # of the dynamic graph
PROMPTS: list[str | Sequence[int]] = ["hello", [5, 17, 3], "日", "a longer prompt than the others"]
GREEDY = GenerateOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", end=(), mixes=MIXES, folded=FOLDED)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with load(bundle, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def alone(model: Model) -> dict[tuple[int, str], list[Any]]:
    return run_alone(model)


def run_alone(model: Model) -> dict[tuple[int, str], list[Any]]:
    """The logits of each prompt under each variant, run by itself."""
    found = {}
    for number, prompt in enumerate(PROMPTS):
        for variant in (*SCALED, "plain", *FOLDED):
            with seen_logits() as seen:
                complete(model, [Routed(prompt, variant)], GREEDY)
            found[number, variant] = seen[0]
    return found


def expected(model: Model, number: int, variant: str) -> list[int]:
    """Plain numpy over the whole sequence, again for every token."""
    prompt = PROMPTS[number]
    assert model.text is not None
    ids = model.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
    start = len(ids)
    for _ in range(12):
        if variant == "xlora":
            logits = reference_exact(BYTE_SHAPE, WEIGHTS, ids, SCALING_PASS)
        else:
            scalings = np.broadcast_to(np.float32(ROWS[variant]), (len(ids), 2, 3))
            logits = reference(BYTE_SHAPE, WEIGHTS, ids, scalings)[0]
        ids = [*ids, int(logits[-1].argmax())]
    return ids[start:]


@pytest.mark.parametrize("variant", [*SCALED, "plain", *FOLDED])
def test_each_variant_is_its_scalings(model: Model, alone: Mapping[tuple[int, str], list[Any]], variant: str) -> None:
    for number in range(len(PROMPTS)):
        assert greedy_ids(alone[number, variant]) == expected(model, number, variant)


def test_the_variants_differ(alone: Mapping[tuple[int, str], list[Any]]) -> None:
    """Otherwise rows could change places unseen."""
    for number in range(len(PROMPTS)):
        assert len({tuple(greedy_ids(alone[number, variant])) for variant in SCALED}) == len(SCALED)


@pytest.mark.parametrize("chunk", [512, 3])
def test_all_pairs_in_one_batch_are_as_alone(model: Model, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged prompts; both orders of each pair, and each variant with itself."""
    monkeypatch.setattr("runtime.routing.CHUNK", chunk)
    alone, ties = run_alone(model), Ties()
    for pair in combinations_with_replacement(SCALED, 2):
        variants = [*pair, *reversed(pair)]
        with seen_logits() as seen:
            complete(model, [Routed(*each) for each in zip(PROMPTS, variants, strict=True)], GREEDY)
        for number, variant in enumerate(variants):
            ties.compare(alone[number, variant], seen[number], f"{variant} in {variants}")
    ties.check()


def test_one_batch_of_all(model: Model, alone: Mapping[tuple[int, str], list[Any]]) -> None:
    rows = [(number, variant) for variant in SCALED for number in range(len(PROMPTS))]
    rows = [rows[place] for place in np.random.default_rng(1).permutation(len(rows))]
    options = dataclasses.replace(GREEDY, batch_size=len(rows))
    ties = Ties()
    with seen_logits() as seen:
        found = complete(model, [Routed(PROMPTS[number], variant) for number, variant in rows], options)
    for place, row in enumerate(rows):
        ties.compare(alone[row], seen[place], str(row))
    ties.check()
    assert [completion.variant for completion in found] == [variant for _, variant in rows]


def test_only_gated_rows_pay_for_a_scaling_pass(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step a token and, while gated rows go on, one more of just those."""
    steps: list[Rows] = []
    step = model.session.step
    monkeypatch.setattr(model.session, "step", lambda rows: steps.append(rows) or step(rows))
    exact = dataclasses.replace(GREEDY, decode="exact")
    [gated, _, _] = complete(model, [Routed(PROMPTS[0], "xlora")] + [Routed(PROMPTS[1], "math")] * 2, exact)
    assert [len(rows.counts) for rows in steps] == [1, 3] * 12
    assert steps[0].scalings is not None
    assert (steps[0].scalings == np.float32(SCALING_PASS)).all()
    steps.clear()
    options = dataclasses.replace(exact, stop_token_ids=(gated.token_ids[3],))
    [gated, other] = complete(model, [Routed(PROMPTS[0], "xlora"), Routed(PROMPTS[1], "math")], options)
    [ended] = complete(model, [Routed(PROMPTS[1], "math")], options)
    assert other.token_ids == ended.token_ids
    assert len(gated.token_ids) < len(other.token_ids)
    batches = [len(rows.counts) for rows in steps[: len(gated.token_ids) + len(other.token_ids)]]
    assert batches == [1, 2] * len(gated.token_ids) + [2] * (len(other.token_ids) - len(gated.token_ids))


def test_a_row_that_ends_early_changes_no_other(model: Model, alone: Mapping[tuple[int, str], list[Any]]) -> None:
    ties = Ties()
    for pair in combinations_with_replacement(SCALED, 2):
        stop = int(alone[0, pair[0]][2].argmax())
        options = dataclasses.replace(GREEDY, stop_token_ids=(stop,))
        with seen_logits() as seen:
            complete(model, [Routed(PROMPTS[0], pair[0]), Routed(PROMPTS[3], pair[1])], options)
        for number, prompt, variant in ((0, 0, pair[0]), (1, 3, pair[1])):
            whole = greedy_ids(alone[prompt, variant])
            count = whole.index(stop) + 1 if stop in whole else len(whole)
            ties.compare(alone[prompt, variant][:count], seen[number], f"{variant} in {pair}")
    ties.check()


def test_sampled_rows_do_not_hear_of_each_other(model: Model) -> None:
    options = GenerateOptions(max_new_tokens=20, sampling=Sampling(1.5, seed=11))
    rows = [Routed(prompt, variant) for prompt in PROMPTS[:2] for variant in SCALED]
    apart = [complete(model, [row], options)[0].token_ids for row in rows]
    assert [completion.token_ids for completion in complete(model, rows, options)] == apart


# --- static variants -----------------------------------------------------------------------------


def test_static_variants_in_the_same_call_come_back_in_order(
    bundle: Path, alone: Mapping[tuple[int, str], list[Any]]
) -> None:
    rows = [(0, "solo"), (1, "xlora"), (2, "blend"), (3, "solo"), (0, "math"), (1, "plain"), (2, "uneven")]
    with load(bundle, threads=1) as model:
        assert not model.others
        found = complete(model, [Routed(PROMPTS[number], variant) for number, variant in rows], GREEDY)
        assert set(model.others) == {"solo", "blend", "plain"}
        sessions = dict(model.others)
        complete(model, [Routed(PROMPTS[0], "solo")], GREEDY)
        assert model.others["solo"] is sessions["solo"]
    for completion, row in zip(found, rows, strict=True):
        assert list(completion.token_ids) == greedy_ids(alone[row])


def test_streaming_runs_batches_in_the_order_of_their_first_prompts(model: Model) -> None:
    variants = ["xlora", "solo", "math", "blend", "solo"]
    prompts = [Routed(PROMPTS[0], variant) for variant in variants]

    def order(**options: int) -> list[int]:
        events = generate(model, prompts, GenerateOptions(max_new_tokens=2, **options))
        return [event.prompt for event in events]

    assert order() == [0, 2, 0, 2, 1, 4, 1, 4, 3, 3]
    assert order(batch_size=1) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_closing_a_model_closes_all_its_sessions(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[OrtSession] = []
    monkeypatch.setattr(OrtSession, "close", lambda self: closed.append(self))
    with load(bundle, threads=1) as model:
        complete(model, [Routed([1], "math"), Routed([1], "solo")], GenerateOptions(max_new_tokens=1))
    assert closed == [model.session, model.others["solo"]]


def test_a_variant_may_choose_the_graph_that_is_opened(bundle: Path) -> None:
    with load(bundle, variant="solo", threads=1) as model:
        assert model.graph.name == "solo"
        complete(model, ["a"], dataclasses.replace(GREEDY, variant="solo"))
        assert not model.others
        complete(model, ["a"], dataclasses.replace(GREEDY, variant="math"))
        assert list(model.others) == ["dynamic"]


def test_without_caches_variants_run_one_by_one(tmp_path: Path, alone: Mapping[tuple[int, str], list[Any]]) -> None:
    shape = dataclasses.replace(BYTE_SHAPE, cache=CacheStyle.NONE)
    with load(tiny_bundle(tmp_path / "b", shape, weights=WEIGHTS, mixes=MIXES, end=()), threads=1) as model:
        found = complete(model, [Routed(PROMPTS[0], variant) for variant in SCALED], GREEDY)
    for completion, variant in zip(found, SCALED, strict=True):
        assert list(completion.token_ids) == greedy_ids(alone[0, variant])


# --- mixes of the caller's ------------------------------------------------------------------------


def test_a_mix_of_the_callers_is_the_named_one(model: Model, alone: Mapping[tuple[int, str], list[Any]]) -> None:
    mixes = [{"math": 0.7, "lyrics": 0.3}, UNEVEN, MixFile(weights={"math": 1.0})]
    found = complete(model, [Routed(PROMPTS[0], mix=mix) for mix in mixes], GREEDY)
    for completion, variant in zip(found, ("warm", "uneven", "math"), strict=True):
        assert list(completion.token_ids) == greedy_ids(alone[0, variant])
        assert completion.variant is None


def test_options_hold_for_prompts_without_a_way_of_their_own(
    model: Model, alone: Mapping[tuple[int, str], list[Any]]
) -> None:
    prompts = [PROMPTS[0], Routed(PROMPTS[1], "code"), Routed(PROMPTS[2])]
    found = complete(model, prompts, dataclasses.replace(GREEDY, variant="warm"))
    for number, (completion, variant) in enumerate(zip(found, ("warm", "code", "warm"), strict=True)):
        assert list(completion.token_ids) == greedy_ids(alone[number, variant])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routed", "message"),
    [
        (Routed("a", "poetry"), r"prompt 2: no variant 'poetry'; need one of: base, math, .*, xlora, plain"),
        (Routed("a", "Math"), "no variant 'Math'"),
        (Routed("a", mix={"poetry": 1.0}), "prompt 2: no expert 'poetry'; need one of: math, code, lyrics"),
        (
            Routed("a", mix={"math": float("nan")}),
            "prompt 2: the weight of math is nan; need a number, at most 1000 in size",
        ),
        (Routed("a", mix={"math": 1e39}), "the weight of math is 1e"),
        (Routed("a", mix=MixInfo(sites={"blocks.7.mlp": {}})), r"no site 'blocks\.7\.mlp'; need one of the 2 adapted"),
        (Routed("a", "math", {"code": 1.0}), "got variant math and a mix; need one"),
    ],
)
def test_bad_ways_are_refused_before_anything_runs(model: Model, routed: Routed, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, ["fine", routed], GREEDY)


def test_all_bad_ways_are_reported_together(model: Model) -> None:
    with pytest.raises(InputError, match="2 problems"):
        generate(model, [Routed("a", "x"), Routed("a", "math"), Routed("a", "y")], GREEDY)


def test_bad_ways_and_bad_prompts_are_reported_together(model: Model) -> None:
    """A prompt's own faults are told beside those of its way, and the options' once, whatever uses them."""
    with pytest.raises(InputError, match="4 problems") as caught:
        generate(model, [Routed("", "x"), Routed([300], "math"), Routed("a", "y")], GREEDY)
    told = str(caught.value).splitlines()[1:]
    for line, start in zip(told, ("1: no variant 'x'", "1: the prompt is empty", "2: unknown", "3: no"), strict=True):
        assert line.startswith(f"  - prompt {start}")
    with pytest.raises(InputError, match="2 problems") as caught:
        generate(model, ["fine", "", "too"], dataclasses.replace(GREEDY, variant="z"))
    assert [line[:18] for line in str(caught.value).splitlines()[1:]] == ["  - no variant 'z'", "  - prompt 2: the "]


def test_a_variant_and_a_mix_exclude_each_other() -> None:
    with pytest.raises(InputError, match="a variant has its own mix; got a variant and a mix; need one of them"):
        GenerateOptions(variant="math", mix={})


def test_a_mix_by_site_needs_a_graph_with_a_row_a_site(model: Model) -> None:
    graph = model.graph
    scalings = graph.signature.input("scalings")
    assert scalings is not None
    one = dataclasses.replace(scalings, shape=(*scalings.shape[:2], 1, scalings.shape[3]))
    inputs = tuple(one if spec.name == "scalings" else spec for spec in graph.signature.inputs)
    shared = graph.model_copy(update={"signature": dataclasses.replace(graph.signature, inputs=inputs)})
    message = r"one row of scalings for all its sites; got a mix with .* for 1 sites\. Fix: build with --scalings sites"
    with pytest.raises(InputError, match=message):
        generate(dataclasses.replace(model, graph=shared), ["a"], dataclasses.replace(GREEDY, mix=UNEVEN))


def test_a_bundle_without_named_variants_says_so(tmp_path: Path) -> None:
    """One of before there were any."""
    with pytest.raises(InputError, match="no variant 'math'; need one of: none; this bundle was built without"):
        load(make_bundle(tmp_path / "old"), variant="math")


def listed(name: str = "warm", **changes: Any) -> VariantInfo:
    fields = {"name": name, "kind": VariantKind.MIX, "graph": "dynamic", "mix": MixInfo(weights={"math": 1.0})}
    return VariantInfo(**(fields | changes))


GATE_KIND, STATIC_KIND = {"kind": VariantKind.GATE, "mix": None}, {"kind": VariantKind.STATIC, "mix": None}


@pytest.mark.parametrize(
    ("variants", "text"),
    [
        ([listed(), listed()], "variants: has a name twice"),
        ([listed(graph="other")], r"variants\.warm: its graph 'other' does not exist"),
        ([listed(graph="static")], "a mix variant cannot run on a static graph"),
        ([listed(**STATIC_KIND)], "a static variant cannot run on a dynamic graph"),
        ([listed(mix=None)], "exactly the variants of the kind mix have a mix"),
        ([listed(kind=VariantKind.GATE)], "exactly the variants of the kind mix have a mix"),
        ([listed(mix=MixInfo(weights={"art": 1.0}))], "its mix names unknown experts: art"),
        ([listed(mix=MixInfo(sites={"nowhere": {}}))], "its mix names unknown sites: nowhere"),
    ],
)
def test_variants_that_contradict_the_bundle_are_refused(variants: list[VariantInfo], text: str) -> None:
    manifest = make_manifest(artifacts_of(bundle_files()), variants=tuple(variants))
    with pytest.raises(InputError, match=text):
        read_manifest(manifest_bytes(manifest))


def test_variants_need_the_gate_or_the_rows_they_are_of() -> None:
    files = artifacts_of(bundle_files())
    read_manifest(manifest_bytes(make_manifest(files, variants=(listed(**GATE_KIND),))))
    with pytest.raises(InputError, match=r"variants\.warm: there is no gate"):
        read_manifest(manifest_bytes(make_manifest(files, variants=(listed(**GATE_KIND),), gate=None)))
    good = make_manifest(files)
    local = listed(mix=MixInfo(sites={good.sites[0].path: {"math": 1.0}}))
    read_manifest(manifest_bytes(make_manifest(files, variants=(local,))))
    with pytest.raises(InputError, match="has weights by site, its graph has not one row of scalings a site"):
        read_manifest(manifest_bytes(make_manifest(files, variants=(local,), sites=good.sites[:3])))


# --- the command line -----------------------------------------------------------------------------


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["generate", *(str(word) for word in words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_every_prompt_is_answered_under_each_variant(
    bundle: Path, alone: Mapping[tuple[int, str], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompt", "hello", "--prompt-ids", "5,17,3", "--max-new-tokens", 12, "-q"]
    variants = ["--variant", "solo", "--variant", "xlora", "--variant", "math"]
    code, out, _ = run(bundle, *prompts, *variants, "--json", capsys=capsys)
    assert code == 0
    wanted = [(number, variant) for number in (0, 1) for variant in ("solo", "xlora", "math")]
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["variant"] for line in lines] == [variant for _, variant in wanted]
    assert [line["token_ids"] for line in lines] == [greedy_ids(alone[row]) for row in wanted]
    short = [bundle, "--prompt-ids", "5", "--max-new-tokens", 1, "-q", *variants]
    shown = run(*short, capsys=capsys)[1]
    assert [line.partition(": ")[0] for line in shown.splitlines()] == ["solo", "xlora", "math"]
    assert run(*short, "--stream", capsys=capsys)[1] == shown


def test_a_mix_file_is_taken_by_its_name(
    bundle: Path, alone: Mapping[tuple[int, str], list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mix(MixFile(weights=UNEVEN.weights, sites=UNEVEN.sites), tmp_path / "mix.json")
    words = ["--prompt", "hello", "--max-new-tokens", 12, "-q", "--json", "--mix", tmp_path / "mix.json"]
    _, out, _ = run(bundle, *words, capsys=capsys)
    assert json.loads(out)["token_ids"] == greedy_ids(alone[0, "uneven"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "poetry"], "error: no variant 'poetry'; need one of: base, math"),
        (["--variant", "math", "--variant", "poetry"], "no variant 'poetry'"),
        (["--variant", "math", "--graph", "plain"], "error: a variant names its graph; got --variant and --graph"),
        (["--mix", "math=nan"], "cannot read 'math=nan'"),
        (["--mix", "absent.json"], "absent.json: cannot read the mix"),
    ],
)
def test_bad_flags_are_a_line_and_exit_2(
    bundle: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(bundle, "-q", "--prompt", "a", *words, capsys=capsys)
    assert message in err
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_variant_and_a_mix_are_one_too_many(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(bundle, "--prompt", "a", "--variant", "math", "--mix", "math=1", capsys=capsys)
    assert caught.value.code == 2


def test_inspect_lists_the_variants(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out.splitlines()
    start = shown.index("variants")
    assert [line.split()[0] for line in shown[start + 1 : start + 11]] == [*[*ROWS][:6], "xlora", "plain", *FOLDED]
    assert "  warm    lyrics=0.3, math=0.7" in shown
    assert "  uneven  math=0.9; weights of their own at 1 sites" in shown
    assert "  solo    folded into the weights of graph solo, a session of its own" in shown


def test_the_shape_without_gate_has_no_xlora(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "b", TinyShape(vocab=300, hidden=16, experts=2, gate=False))
    with (
        load(path) as model,
        pytest.raises(InputError, match="no variant 'xlora'; need one of: base, math, code, plain"),
    ):
        complete(model, ["a"], GenerateOptions(variant="xlora"))


@pytest.mark.parametrize(("variants", "bad"), [(("math", "xlora", "base"), 1), (("math", "base", "xlora"), 2)])
def test_bad_numbers_name_the_prompt(variants: tuple[str, ...], bad: int, tmp_path: Path) -> None:
    """Gated rows come first in a step; the error counts as the caller does."""
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    weights["embed"][7] = np.nan
    prompts = [Routed([5, 6] if number != bad else [5, 7], variant) for number, variant in enumerate(variants)]
    message = f"is not finite for prompt {bad + 1} of the step"
    with (
        load(tiny_bundle(tmp_path / "bad", weights=weights, end=())) as model,
        pytest.raises(NumericError, match=message),
    ):
        complete(model, prompts, GREEDY)
