"""Rules that change logits by the text so far, under every way to decode: drafts change no token."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from runtime import GenerateOptions, InputError, Model, Sampling, complete, load
from runtime.bundle import open_bundle
from runtime.cli import main
from runtime.defaults import rules_of, with_defaults
from runtime.manifest import GenerationDefaults
from runtime.sampling import distribution
from runtime.sealed_folder import manifest_bytes
from runtime.serving import Serving
from runtime.token_rules import TokenRules
from tests.runtime.bundle_makers import seal
from tests.runtime.test_speculation import ACCEPTED, excess
from tests.runtime.tiny_bundles import END, SCALING_PASS, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape, reference_exact, tiny_weights

DEFAULTS = GenerationDefaults(
    repetition_penalty=1.7,
    no_repeat_ngram_size=2,
    suppress_tokens=(7, 90),
    min_new_tokens=9,
    begin_suppress_tokens=(3,),
)
PROMPTS = [[1, 2, 3], [9], [40, 41, 42, 43, 40, 41], [8, 8, 8, 8], [100, 200], [5, 6, 5]]


def under(model: Model, defaults: GenerationDefaults) -> Model:
    return dataclasses.replace(model, manifest=model.manifest.model_copy(update={"generation": defaults}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with load(tiny_bundle(tmp_path_factory.mktemp("rules") / "bundle"), threads=1) as found:
        yield found


def tokens(model: Model, **options: object) -> list[tuple[int, ...]]:
    how = GenerateOptions(**({"max_new_tokens": 14} | options))  # type: ignore[arg-type]
    return [done.token_ids for done in complete(model, PROMPTS, how)]


@pytest.mark.parametrize("size", [2, 16])
@pytest.mark.parametrize("decode", ["paired", "auto", "paired:3", "lookup:4", "frozen:99"])
def test_drafts_change_no_token(model: Model, decode: str, size: int) -> None:
    ruled = under(model, DEFAULTS)
    want = tokens(ruled, decode="exact", batch_size=1)
    assert want != tokens(ruled, decode="exact", batch_size=1, defaults=False)
    assert tokens(ruled, decode=decode, batch_size=size) == want


def test_a_draft_knows_the_text_before_it(tmp_path: Path) -> None:
    """Where experts do nothing the scaling pass is the main pass: with the same rules every draft comes true."""
    shape = TinyShape(vocab=300, hidden=16, experts=3)
    weights = {name: value * (not name.startswith("expert")) for name, value in tiny_weights(shape).items()}
    with load(tiny_bundle(tmp_path / "bundle", shape, weights=weights), threads=1) as model:
        for decode in ("paired", "paired:3"):
            done = complete(under(model, DEFAULTS), PROMPTS, GenerateOptions(20, decode=decode))
            assert sum(each.timings.drafts for each in done) > 60
            assert all(each.timings.accepted == each.timings.drafts for each in done)


def test_serving_applies_the_same(model: Model) -> None:
    ruled = under(model, DEFAULTS)
    with Serving(ruled) as serving:
        answers = [serving.submit(prompt, GenerateOptions(14)) for prompt in PROMPTS]
        found = [answer.completion(60).token_ids for answer in answers]
    assert found == tokens(ruled, decode="exact", batch_size=1)


SMALL = TinyShape(vocab=5, hidden=8, experts=3)
WARM = GenerationDefaults(do_sample=True, temperature=1.3, repetition_penalty=2.5, no_repeat_ngram_size=3, top_k=4)
START, NEW = [1, 3], 3


@pytest.mark.parametrize("decode", ["paired", "paired:2", "lookup:2"])
def test_drawn_tokens_have_the_distribution_of_their_text(tmp_path: Path, decode: str) -> None:
    """All texts of three tokens, by the graph in numpy and the rules applied one after the other."""
    weights = tiny_weights(SMALL)
    sampling = with_defaults(Sampling(), WARM)
    rules = rules_of(sampling, WARM, ())
    assert rules is not None
    expected: dict[object, float] = {}
    for text in product(range(SMALL.vocab), repeat=NEW):
        logits = reference_exact(SMALL, weights, [*START, *text], SCALING_PASS)
        share = 1.0
        for place, token in enumerate(text):
            before = np.array([*START, *text[:place]])
            after = rules.apply(logits[len(before) - 1].astype(np.float32), before, len(START), NEW)
            found = distribution(after, sampling)
            share *= float(dict(zip(found.ids.tolist(), found.probabilities.tolist(), strict=True)).get(token, 0.0))
        expected[text] = share
    assert sum(expected.values()) == pytest.approx(1)
    bundle = tiny_bundle(tmp_path / "bundle", SMALL, weights=weights, tokenizer=False, end=())
    with load(bundle, threads=1) as model:
        rows = complete(under(model, WARM), [START] * 3000, GenerateOptions(NEW + 1, batch_size=100, decode=decode))
    assert excess(Counter(done.token_ids[:NEW] for done in rows), expected) < ACCEPTED


def test_a_request_settles_each_field_for_itself() -> None:
    base = GenerationDefaults(do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)
    assert with_defaults(Sampling(), base) == Sampling(0.7, 20, 0.8)
    assert with_defaults(Sampling(top_p=0.5, seed=1), base) == Sampling(0.7, 20, 0.5, 1)
    assert with_defaults(Sampling(0.0), base) == Sampling(0.0), "an explicit 0 is greedy"
    assert with_defaults(Sampling(), GenerationDefaults(top_k=3)) == Sampling(0.0), "the base does not sample"
    with pytest.raises(InputError, match="mean nothing at temperature"):
        with_defaults(Sampling(top_k=3), GenerationDefaults())
    assert rules_of(Sampling(0.0, repetition_penalty=1.0), base, ()) is None
    assert rules_of(Sampling(0.0), GenerationDefaults(), (END,)) is None
    own = rules_of(Sampling(0.0, no_repeat_ngram_size=3, suppress_tokens=(4,), min_new_tokens=2), base, (END,))
    assert own == TokenRules((END,), (), 1.1, 3, (), 0, 2, suppress_tokens=(4,))


def test_no_default_means_no_work(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenRules, "apply", lambda *_: pytest.fail("nothing is set"))
    tokens(model, max_new_tokens=2)


def test_the_rules_of_a_large_vocabulary_take_little_time() -> None:
    """Below 1 ms by the median, but for noise: the limit here is four times that."""
    rules = TokenRules((5,), (), 1.2, 3, ((7, 8),), 0, 2, suppress_tokens=(4,), begin_suppress_tokens=(9,))
    logits, text = np.zeros(150_000, np.float32), np.arange(2000)
    took = []
    for _ in range(15):
        began = perf_counter()
        rules.apply(logits, text, 100, 4000)
        took.append(perf_counter() - began)
    print(f"{1e3 * min(took):.3f} ms")
    assert min(took) < 4e-3


def test_the_command_says_what_it_applies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny_bundle(tmp_path / "bundle")
    defaults = DEFAULTS.model_copy(update={"max_new_tokens": 4, "not_applied": {"num_beams": "2"}})
    manifest = open_bundle(root).manifest.model_copy(update={"generation": defaults})
    seal(root, manifest_bytes(manifest))
    command = ["generate", str(root), "--prompt-ids", "1,2,3", "--json"]
    assert main(command) == 0
    told = capsys.readouterr()
    assert len(json.loads(told.out)["token_ids"]) == 4
    assert "defaults of the base's generation config" in told.err
    assert "repetition_penalty 1.7, no_repeat_ngram_size 2" in told.err
    assert "not applied of the base's generation config: num_beams" in told.err
    assert main([*command, "--no-defaults", "--max-new-tokens", "4"]) == 0
    raw = capsys.readouterr()
    assert "generation config" not in raw.err
    assert json.loads(raw.out)["token_ids"] != json.loads(told.out)["token_ids"]
    own = ["--repetition-penalty", "1.7", "--no-repeat-ngram-size", "2", "--suppress-tokens", "3,7,90"]
    assert main([*command, "--no-defaults", "--max-new-tokens", "1", *own]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == json.loads(told.out)["token_ids"][:1]
