"""A learned mix: the exported network, only its weights move, and on the demo it beats the uniform mix."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporter.build_bundle import build
from exporter.cli import main
from exporter.dynamic import replaced
from exporter.errors import ExportError
from exporter.learn_mix import first_rows, groups_of, learn_mix, split, summed_loss
from exporter.mixture import Mixture, blocks_of, mixed_modules
from exporter.spec import AdapterSource, BuildSpec, LearnSpec, Per
from exporter.training_texts import TrainingText, read_texts
from runtime.backends import open_session
from runtime.bundle import Bundle
from runtime.errors import InputError, UserError
from runtime.generate import complete
from runtime.manifest import Mode, VerifyLevel
from runtime.mix_file import MixFile, read_mix, scalings_from_file, write_mix
from runtime.model import load as load_model
from runtime.prompts import GenerateOptions
from runtime.replay import replay
from runtime.session import Session, SessionSettings
from runtime.text import Text
from tests.exporter.checkpoint_makers import edit_json, write_lora
from tests.exporter.tiny_builds import (
    difference,
    load,
    named_sources,
    prompt,
    reference_of,
    write_checkpoint,
    write_lively_base,
    write_three_experts,
)

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "four-tasks"
TASKS = ("add", "reverse", "sort", "cipher")
sys.path.insert(0, str(ROOT / "scripts"))


def demo_spec(data: Path, **settings: object) -> LearnSpec:
    spec = LearnSpec(data, named_sources({task: DEMO / "experts" / task for task in TASKS}), str(DEMO / "base"))
    return replace(spec, **settings)  # type: ignore[arg-type]


def write_training(path: Path, tasks: Sequence[str], count: int) -> Path:
    """Training items of the demo's tasks; none is among the held-out ones."""
    from demo_tasks import training_items

    items = islice(training_items(tasks, random.Random(1)), count)
    lines = [json.dumps({"prompt": item.prompt, "completion": item.answer}) for item in items]
    path.write_text("\n".join(lines) + "\n")
    return path


# --- the network that is trained ---


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "gpt_neox", "gemma3_text", "mixtral"])
def test_the_trained_network_is_the_reference(family: str, tmp_path: Path) -> None:
    """Every kind of module, one row a site: the logits of the oracle under the softmax of the mixture's logits."""
    base = write_lively_base(tmp_path / "base", family)
    parts = load(base, *named_sources(write_three_experts(tmp_path / "experts", base, family)))
    reference = reference_of(parts)
    paths = [site.path for site in parts.sites]
    mixture = Mixture(torch.full((len(paths), 3), 1 / 3), paths)
    with torch.no_grad():
        mixture.logits.normal_(generator=torch.Generator().manual_seed(3))
    tokens = prompt(9)
    modules = {path: parts.model.get_submodule(path) for path in paths}
    with replaced(parts.model, mixed_modules(parts.model, parts.sites, mixture)):
        logits = parts.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    rows = mixture.weights().tolist()
    assert difference(logits, reference.constant(rows, tokens).logits) <= 1e-4
    assert difference(logits, reference.constant([1 / 3] * 3, tokens).logits) > 0.05
    logits.sum().backward()
    assert float(mixture.logits.grad.abs().min()) > 0  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in parts.model.parameters())
    assert all(parts.model.get_submodule(path) is module for path, module in modules.items())


def test_only_what_is_to_be_learned_counts(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base")
    model = load(base, *named_sources(write_three_experts(tmp_path / "experts", base))).model
    texts = [TrainingText((5, 6, 7, 8), 2), TrainingText((9, 3, 4, 1, 2, 7), 1)]
    total, count = summed_loss(model, texts)
    assert count == 2 + 5
    expected = 0.0
    for text in texts:
        shares = model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
        expected -= sum(float(shares[i - 1, text.ids[i]]) for i in range(text.learned_from, len(text.ids)))
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_blocks_are_named_by_their_number() -> None:
    paths = ["model.embed_tokens", "model.layers.0.a.q", "model.layers.0.b", "model.layers.11.a.q", "lm_head"]
    names = ["model.embed_tokens", "model.layers.0", "model.layers.0", "model.layers.11", "lm_head"]
    assert list(blocks_of(paths)) == names


# --- the demo ---


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix for `cipher`, and one for `reverse` with weights by site, each from 32 items."""
    folder = tmp_path_factory.mktemp("learned")
    for name, per in (("cipher", Per.GLOBAL), ("reverse", Per.SITE)):
        data = write_training(folder / f"{name}.jsonl", (name,), 32)
        result = learn_mix(demo_spec(data, per=per))
        assert result.best_loss < 0.5 * result.first_loss
        write_mix(result.mix, folder / f"{name}.json")
    return folder


@pytest.fixture(scope="module")
def bundle(learned: Path) -> Bundle:
    """The demo as a dynamic graph and as the learned mix for `cipher`, static."""
    mix = read_mix(learned / "cipher.json")
    modes = (Mode.DYNAMIC, Mode.STATIC)
    adapters = (AdapterSource(DEMO / "xlora"),)
    return build(BuildSpec(adapters, modes=modes, mix=mix, out=learned / "bundle", verify=VerifyLevel.QUICK, threads=1))


def held_out(task: str) -> tuple[list[str], list[str]]:
    """Prompts and right answers."""
    from demo_tasks import read_items

    items = [item for item in read_items(DEMO / "heldout.jsonl") if item.task == task]
    return [item.prompt for item in items], [item.answer for item in items]


def score(bundle: Bundle, task: str, mix: dict[str, float] | None, graph: str) -> float:
    """Exact match on the held-out items."""
    prompts, answers = held_out(task)
    with load_model(bundle.root, graph=graph) as model:
        done = complete(model, prompts, GenerateOptions(8, mix=mix, batch_size=64))
    return sum(d.text == answer for d, answer in zip(done, answers, strict=True)) / len(answers)


def test_a_few_items_beat_the_uniform_mix_on_held_out_ones(bundle: Bundle, learned: Path) -> None:
    mix = read_mix(learned / "cipher.json")
    assert mix.weights["cipher"] > 0.8
    assert sum(mix.weights.values()) == pytest.approx(1, abs=1e-5)
    uniform = score(bundle, "cipher", dict.fromkeys(TASKS, 0.25), "dynamic")
    as_row, folded = score(bundle, "cipher", mix.weights, "dynamic"), score(bundle, "cipher", None, "static")
    print(f"cipher: uniform {uniform:.3f}, learned {as_row:.3f} as a row, {folded:.3f} folded")
    assert uniform < 0.3
    assert as_row > 0.9
    assert folded == as_row


def test_weights_by_site_are_fed_as_they_are(bundle: Bundle, learned: Path) -> None:
    """One row a site, to the session of the dynamic graph."""
    mix, uniform = read_mix(learned / "reverse.json"), MixFile(weights=dict.fromkeys(TASKS, 0.25))
    paths = [site.path for site in bundle.manifest.sites]
    assert sorted(mix.sites) == sorted(paths)
    graph = next(graph for graph in bundle.manifest.graphs if graph.mode is Mode.DYNAMIC)
    session = open_session("ort", bundle.file(graph.path), graph.signature, SessionSettings(256, threads=1))
    experts = [expert.name for expert in bundle.manifest.experts]
    try:
        scores = [
            score_row(session, bundle, np.broadcast_to(scalings_from_file(m, experts, paths), (len(paths), 4)))
            for m in (mix, uniform)
        ]
    finally:
        session.close()
    print(f"reverse: learned by site {scores[0]:.3f}, uniform {scores[1]:.3f}")
    assert scores[0] > 0.9
    assert scores[1] < 0.3


def score_row(session: Session, bundle: Bundle, row: NDArray[np.float32]) -> float:
    """Exact match on the held-out items of `reverse` under scalings [G, E]."""
    text = Text(bundle.file("tokenizer/tokenizer.json"))
    prompts, answers = held_out("reverse")
    runs = replay(session, [text.encode(prompt) for prompt in prompts], 8, row, is_gated=False)
    ends = [[*text.encode(answer, specials=False), 257] for answer in answers]
    right = [list(run.tokens[run.prompt :][: len(end)]) == end for run, end in zip(runs, ends, strict=True)]
    return sum(right) / len(right)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    data = write_training(tmp_path / "data.jsonl", ("sort",), 12)
    spec = demo_spec(data, epochs=2)
    first, again, other = learn_mix(spec), learn_mix(spec), learn_mix(replace(spec, seed=1))
    assert first == again
    assert first.rows != other.rows


def test_it_begins_where_it_is_told_and_keeps_the_best(tmp_path: Path) -> None:
    """A rate that only does harm: the first weights are the best there were."""
    data = write_training(tmp_path / "data.jsonl", ("sort",), 12)
    start = {"add": 0.02, "reverse": 0.02, "sort": 0.94, "cipher": 0.02}
    write_mix(MixFile(weights=start), tmp_path / "start.json")
    result = learn_mix(demo_spec(data, init=tmp_path / "start.json", epochs=9, patience=2, learning_rate=10.0))
    assert result.mix.weights == pytest.approx(start, abs=1e-6) or result.best_loss < result.first_loss
    assert result.epochs < 9, "it stops early"


# --- what is refused ---


@pytest.fixture(scope="module")
def tokenizer() -> Text:
    return Text(DEMO / "base" / "tokenizer.json")


def test_texts_become_tokens(tokenizer: Text, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "ab", "completion": "c"}\n{"text": "abc"}\n{"prompt": "", "completion": "c"}')
    found = read_texts(data, tokenizer, 257, 9)
    assert found[0] == TrainingText((256, 97, 98, 99, 257), 3), "bos once, an end after the completion"
    assert found[1] == TrainingText((256, 97, 98, 99), 1)
    assert found[2] == TrainingText((256, 99, 257), 1)


def test_every_bad_line_is_named(tokenizer: Text, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = [
        '{"prompt": "a", "completion": "b"}', "", "nonsense", "[]", '{"prompt": "a"}', '{"text": 1}',
        '{"text": "a", "completion": "b"}', '{"text": "a", "texts": "b"}', '{"text": ""}', '{"text": "aaaaaaaaa"}',
        '{"text": "a", "text": "b"}',
    ]  # fmt: skip
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        read_texts(data, tokenizer, None, 9)
    message = str(caught.value)
    assert [number for number in range(1, 12) if f"line {number}: is no training text" in message] == [*range(2, 12)]
    for reason in ("has prompt; need", "has completion, text", "has the key 'text' twice", "has 10 tokens"):
        assert reason in message, reason
    with pytest.raises(UserError, match="cannot be opened"):
        read_texts(tmp_path / "absent", tokenizer, None, 9)
    data.write_text('{"text": "ab"}\n{"text": "ax"}\n')
    assert len(read_texts(data, tokenizer, None, 9, 257)) == 2
    with pytest.raises(UserError, match=r"line 2: .*; got has the token 256, and the model knows 0 to 255"):
        read_texts(data, tokenizer, None, 9, 256)


@pytest.mark.parametrize(
    "weights", [{"add": 1.0}, dict.fromkeys(TASKS, 0.3), dict.fromkeys(TASKS, 0.5) | {"add": -0.5}]
)
def test_learning_begins_at_positive_weights_that_sum_to_1(weights: dict[str, float]) -> None:
    parts = load(DEMO / "base", *named_sources({task: DEMO / "experts" / task for task in TASKS}))
    with pytest.raises(
        ExportError, match="--init: learning cannot begin at this mix; need positive weights that sum to 1"
    ):
        first_rows(parts, MixFile(weights=weights))
    assert len(set(groups_of(parts.sites, Per.BLOCK))) == 4


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"patience": 0}, "--patience"),
        ({"batch": 0}, "--batch"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"validation": 1.0}, "--validation"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, float], flag: str) -> None:
    with pytest.raises(ExportError, match=f"{flag}: cannot be; got "):
        learn_mix(demo_spec(Path("absent"), **settings))


def test_two_texts_are_the_least() -> None:
    text = TrainingText((1, 2), 1)
    with pytest.raises(ExportError, match="too few texts; got 1; need at least 2"):
        split([text], demo_spec(Path("data")))
    train, held = split([text] * 3, demo_spec(Path("data"), validation=0.01))
    assert (len(train), len(held)) == (2, 1)
    train, held = split([text] * 3, demo_spec(Path("data"), validation=0.99))
    assert (len(train), len(held)) == (1, 2)
    many = [TrainingText((1, number), 1) for number in range(20)]
    train, held = split(many, demo_spec(Path("data")))
    assert sorted(text.ids for text in (*train, *held)) == [text.ids for text in many]
    assert held != split(many, demo_spec(Path("data"), seed=1))[1]


# --- the command ---


def test_the_command_writes_a_mix_or_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_training(tmp_path / "data.jsonl", ("add",), 10)
    adapters = [f"{task}={DEMO / 'experts' / task}" for task in TASKS]
    words = ["learn-mix", "--base", str(DEMO / "base"), "--adapters", *adapters, "--data", str(data)]
    out = tmp_path / "mix.json"
    assert main([*words, "--out", str(out), "--per", "block", "--epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(TASKS)
    assert [line.split()[0] for line in lines[1:5]] == [f"model.layers.{block}" for block in range(4)]
    assert lines[-2].startswith("validation loss ")
    assert lines[-1] == str(out)
    assert len(read_mix(out).sites) == 28
    before = sorted(path.name for path in tmp_path.iterdir())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.learn_mix.fit", interrupted)
    assert main([*words, "--out", str(tmp_path / "other.json")]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "absent" / "mix.json")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "folder.json").mkdir()
    for name in ("mix.txt", "mix", "folder.json"):
        assert main([*words, "--out", str(tmp_path / name)]) == 2
        assert "--out: cannot be a mix file" in capsys.readouterr().err
    (tmp_path / "folder.json").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_experts_without_weights_to_learn_are_refused(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    plain = write_lora(tmp_path / "plain", base, ("q_proj",), 2)
    dora = write_lora(tmp_path / "dora", base, ("q_proj",), 2, use_dora=True)
    for experts, message in (
        ({"plain": plain}, "one expert has nothing to be weighed against; need at least 2 experts"),
        ({"dora": dora}, "one expert has nothing"),
        ({"dora": dora, "plain": plain}, "--adapters: dora cannot be mixed: DoRA divides"),
    ):
        spec = LearnSpec(tmp_path / "data.jsonl", named_sources(experts), str(base))
        with pytest.raises(InputError, match=message):
            learn_mix(spec)


def test_the_gates_top_k_rule_is_no_matter_of_learning(tmp_path: Path) -> None:
    """Flattened, it needs the whole sequence at every step; here it is not used at all."""
    checkpoint = write_checkpoint(tmp_path, "qwen3")
    edit_json(checkpoint.xlora / "adapter_config.json", peft_version="0.17.1")
    with pytest.raises(ExportError, match="has no tokenizer"):  # what comes next
        learn_mix(LearnSpec(tmp_path / "absent.jsonl", (AdapterSource(checkpoint.xlora),), str(checkpoint.base)))
