"""The base's own generation settings: the same logits, the same tokens as transformers' own `generate`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from exporter.build_bundle import build
from exporter.checkpoints import describe_base
from exporter.checkpoints.blank import load_blank
from exporter.errors import ExportError
from exporter.generation_defaults import eos_token_ids, generation_defaults, generation_notes
from runtime import GenerateOptions, Model, Routed, Sampling, complete, load
from runtime.defaults import NONE, rules_of, with_defaults
from runtime.inspect import render
from runtime.sampling import distribution
from tests.exporter.checkpoint_makers import load_model, write_base, write_lora
from tests.exporter.peft_models import peft_lora
from tests.exporter.tiny_builds import named_sources, quick

NEW, PROMPT = 10, [5, 21, 33, 7, 45, 9, 33]
ENDS = [2, 40]
# Each alone changes greedy tokens of the tiny model, which the test of each asserts.
GREEDY: Mapping[str, Any] = {
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "sequence_bias": [[[21], 6.0], [[33, 11], 40.0]],
    "bad_words_ids": "FIRST",
    "suppress_tokens": "FIRST",
    "begin_suppress_tokens": "FIRST",
    "forced_eos_token_id": [2],
    "exponential_decay_length_penalty": [3, 3.0],
    "min_new_tokens": 6,
    "min_length": 11,
    "max_new_tokens": 4,
    "max_length": 12,
}
DRAWN: Mapping[str, Any] = {
    "temperature": 0.6,
    "top_k": 7,
    "top_p": 0.8,
    "min_p": 0.1,
    "typical_p": 0.7,
    "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.03,
}
RULES: Mapping[str, Any] = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "sequence_bias": [[[21], 1.5], [[9, 33], 2.0]],
    "bad_words_ids": [[3], [2], [33, 12]],
    "suppress_tokens": [4, 5],
    "begin_suppress_tokens": [6, 7],
    "exponential_decay_length_penalty": [2, 1.2],
    "min_new_tokens": 4,
    "min_length": 9,
    "remove_invalid_values": True,
    "forced_bos_token_id": 12,
    "forced_eos_token_id": 2,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    base = write_base(folder / "base", eos_token_id=2)
    write_lora(folder / "a", base, scale=1.0)
    said = {"eos_token_id": ENDS, "repetition_penalty": 1.3, "suppress_tokens": [7], "num_beams": 2, "novel": 1}
    (base / "generation_config.json").write_text(json.dumps(said | {"do_sample": True, "temperature": 0.7}))
    spec = quick(named_sources({"a": folder / "a"}), base)
    build(dataclasses.replace(spec, out=folder / "bundle"))
    return folder


@pytest.fixture(scope="module")
def oracle(sources: Path) -> Any:
    return peft_lora(sources / "base", sources / "a").base_model.model


@pytest.fixture(scope="module")
def bundle(sources: Path) -> Iterator[Model]:
    with load(sources / "bundle", threads=1) as model:
        yield model


def under(bundle: Model, oracle: Any, fields: Mapping[str, Any]) -> Model:
    """Both with these settings: the oracle's are what `from_pretrained` would have loaded."""
    oracle.generation_config = GenerationConfig(**({"eos_token_id": ENDS, "pad_token_id": 0} | dict(fields)))
    base = bundle.manifest.base.model_copy(update={"eos_token_ids": eos_token_ids(oracle)})
    manifest = bundle.manifest.model_copy(update={"generation": generation_defaults(oracle), "base": base})
    return dataclasses.replace(bundle, manifest=manifest)


def theirs(oracle: Any, prompt: list[int] = PROMPT, **asked: Any) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = oracle.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **asked)
    return tuple(out[0, len(prompt) :].tolist())


def ours(model: Model, prompt: list[int] = PROMPT, **options: Any) -> tuple[int, ...]:
    how = GenerateOptions(sampling=Sampling(0.0), variant="a", **options)
    return complete(model, [prompt], how)[0].token_ids


def spelled(name: str, value: Any, plain: tuple[int, ...]) -> Any:
    """FIRST is a token that would come first."""
    if value != "FIRST":
        return value
    return [[plain[0]]] if name == "bad_words_ids" else [plain[0]]


@pytest.mark.parametrize("name", GREEDY)
def test_each_setting_alone_gives_transformers_greedy_tokens(bundle: Model, oracle: Any, name: str) -> None:
    asked = {} if name.startswith("max") else {"max_new_tokens": NEW}
    under(bundle, oracle, {})
    plain = theirs(oracle, max_new_tokens=NEW)
    ends = list(plain[1:2]) if name.startswith(("min", "exponential")) else ENDS
    fields = {name: spelled(name, GREEDY[name], plain), "eos_token_id": ends}
    model = under(bundle, oracle, fields)
    assert ours(model, **asked) == theirs(oracle, **asked)
    if name != "exponential_decay_length_penalty":
        under(bundle, oracle, {"eos_token_id": ends})
        assert ours(model, **asked) != theirs(oracle, max_new_tokens=NEW), "the setting matters"
    if not name.startswith("max"):
        assert ours(model, defaults=False, **asked) == theirs(under_plain(bundle, oracle, ends), **asked)


def under_plain(bundle: Model, oracle: Any, ends: list[int]) -> Any:
    under(bundle, oracle, {"eos_token_id": ends})
    return oracle


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("prompt", [PROMPT, [5]], ids=["seven", "one"])
def test_random_settings_together_give_transformers_greedy_tokens(
    bundle: Model, oracle: Any, seed: int, prompt: list[int]
) -> None:
    random = np.random.default_rng(seed)
    fields = {name: RULES[name] for name in RULES if random.random() < 0.5}
    fields["eos_token_id"] = [ENDS, 40, None][seed % 3] if "exponential_decay_length_penalty" not in fields else ENDS
    model = under(bundle, oracle, fields)
    want = theirs(oracle, prompt, max_new_tokens=NEW)
    assert ours(model, prompt, max_new_tokens=NEW) == want, fields


@pytest.mark.parametrize("seed", range(40))
def test_what_is_drawn_from_is_what_transformers_draws_from(bundle: Model, oracle: Any, seed: int) -> None:
    """Random logits and texts: the same tokens may come, with the same probabilities."""
    random = np.random.default_rng(seed)
    drawn = list(DRAWN) if seed < 5 else [name for name in DRAWN if random.random() < 0.5]
    fields = {"do_sample": True} | {name: DRAWN[name] for name in drawn}
    fields |= {name: RULES[name] for name in RULES if random.random() < 0.4}
    model = under(bundle, oracle, fields)
    prompt, new = int(random.integers(1, 9)), int(random.integers(0, NEW))
    text = random.integers(0, 50, prompt + new)
    logits = (4 * random.standard_normal(model.vocab_size)).astype(np.float32)
    config, _ = oracle._prepare_generation_config(None)
    config.max_length = prompt + NEW
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + prompt
    oracle._prepare_special_tokens(config, device="cpu")
    processors = oracle._get_logits_processor(config, input_ids_seq_length=prompt, device="cpu")
    want = processors(torch.tensor(text)[None], torch.tensor(logits)[None])[0].double().softmax(-1).numpy()

    defaults = model.manifest.generation or NONE
    sampling = with_defaults(Sampling(), defaults)
    rules = rules_of(sampling, defaults, model.end_token_ids)
    found = distribution(logits if rules is None else rules.apply(logits, text, prompt, NEW), sampling)
    got = np.zeros(len(logits))
    got[found.ids] = found.probabilities
    assert np.array_equal(got > 1e-30, want > 1e-30)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("decode", ["paired", "auto", "lookup:4", "paired:3"])
def test_a_dozen_rows_of_other_texts_together_are_each_alone(bundle: Model, oracle: Any, decode: str) -> None:
    model = under(bundle, oracle, {name: RULES[name] for name in list(RULES)[:9]})
    prompts = [[(7 * row + n) % 50 for n in range(1 + row % 5)] for row in range(12)]
    want = [theirs(oracle, prompt, max_new_tokens=NEW) for prompt in prompts]
    how = GenerateOptions(NEW, Sampling(0.0), batch_size=5, decode=decode)
    assert [done.token_ids for done in complete(model, [Routed(p, "a") for p in prompts], how)] == want


@pytest.mark.parametrize(("value", "ends"), [(2, (2,)), ([40, 2], (2, 40)), (None, ())])
def test_end_tokens_are_those_of_the_generation_config(oracle: Any, value: Any, ends: tuple[int, ...]) -> None:
    oracle.generation_config = GenerationConfig(eos_token_id=value)
    assert eos_token_ids(oracle) == ends


def test_a_build_keeps_what_the_base_says_and_tells_what_it_cannot_do(bundle: Model, sources: Path) -> None:
    found = bundle.manifest.generation
    assert found is not None
    assert (found.repetition_penalty, found.suppress_tokens, found.do_sample, found.temperature, found.top_k) == (
        1.3, (7,), True, 0.7, 50,
    )  # fmt: skip
    assert found.not_applied == {"novel": "1", "num_beams": "2"}
    assert bundle.manifest.base.eos_token_ids == (2, 40)
    [note] = generation_notes(found)
    assert "novel=1, num_beams=2" in note
    text = render(bundle.bundle)
    assert "repetition_penalty 1.3" in text
    assert "NOT APPLIED  novel 1, num_beams 2" in text


def test_settings_of_old_models_in_their_config_count_too(sources: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"repetition_penalty": 1.4, "suppress_tokens": [3]}))
    found = generation_defaults(load_model(base))
    assert found is not None
    assert (found.repetition_penalty, found.suppress_tokens) == (1.4, (3,))
    blank = load_blank(describe_base(str(base)), torch.float16)
    assert blank is not None
    assert generation_defaults(blank.model) == found


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": -1.0},
        {"repetition_penalty": 2},
        {"bad_words_ids": [[-1]]},
        {"sequence_bias": [[[9999], 1.0]]},
        {"do_sample": True, "temperature": 0.0},
        {"min_new_tokens": 1.5},
        {"forced_eos_token_id": 9999},
    ],
)
def test_what_transformers_refuses_is_refused(bundle: Model, oracle: Any, fields: dict[str, Any]) -> None:
    oracle.generation_config = GenerationConfig(**({"eos_token_id": ENDS} | fields))
    with pytest.raises((ValueError, TypeError, IndexError)):
        oracle.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=3, do_sample="do_sample" in fields)
    with pytest.raises(ExportError, match="generation settings cannot be used"):
        generation_defaults(oracle)
