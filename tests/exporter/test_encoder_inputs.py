"""What is refused about encoders, and how: one clear error before any work, nothing published."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.checkpoints import describe_base, load_base
from exporter.cli import main as exporter_main
from exporter.encoder_settings import encoder_info, labels_of, positions_of, scores_of
from exporter.errors import ExportError
from exporter.inputs import read_inputs
from exporter.inspect import inspect_checkpoint, render
from exporter.spec import BuildSpec, CacheChoice, HotSpec, OpChoice, RouterSpec
from runtime.bundle import open_bundle, read_manifest
from runtime.cli import main
from runtime.encode import EncodeOptions, Variant, classify, embed, load_encoder
from runtime.encode import scores_of as scores_from
from runtime.encode_golden import ENCODED_PATH, read_encoded
from runtime.encoder_passes import encode_batch
from runtime.encoder_session import EncodedText, EncoderSession, TextRows
from runtime.errors import InputError, NumericError
from runtime.inspect import render as render_bundle
from runtime.manifest import Emit, Pooling, Scores, Task, TopkSoftmax
from runtime.model import load
from runtime.routers import RouterKind
from runtime.routing import route_for
from runtime.sealed_folder import manifest_bytes
from runtime.session import SessionSettings
from tests.exporter.checkpoint_makers import edit_json, edit_tensors, write_base
from tests.exporter.encoder_makers import (
    EncoderBuilt,
    EncoderCheckpoint,
    write_encoder,
    write_random,
    write_sentence_layout,
)
from tests.exporter.mutations import copy_of, edit_weight
from tests.exporter.reseal import reseal
from tests.runtime.tiny_bundles import tiny_bundle


@pytest.fixture(scope="module")
def random_bert(tmp_path_factory: pytest.TempPathFactory) -> EncoderCheckpoint:
    return write_random(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "base")


@pytest.mark.parametrize(
    ("architecture", "asked", "task"),
    [
        ("BertModel", None, Task.FEATURE_EXTRACTION),
        ("BertForMaskedLM", None, Task.FEATURE_EXTRACTION),
        ("BertForPreTraining", None, Task.FEATURE_EXTRACTION),
        ("BertForTokenClassification", Task.FEATURE_EXTRACTION, Task.FEATURE_EXTRACTION),
    ],
)
def test_the_task_is_the_architectures(base: Path, architecture: str, asked: Task | None, task: Task) -> None:
    edit_json(base / "config.json", architectures=[architecture])
    assert describe_base(str(base), asked).task is task


def test_a_masked_language_head_is_left_out(tmp_path: Path) -> None:
    """Its checkpoints name the encoder bert.*, have cls.* and no pooler."""
    base = write_encoder(tmp_path / "base")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            value = tensors.pop(name)
            if not name.startswith("pooler."):
                tensors[f"bert.{name}"] = value
        tensors["cls.predictions.bias"] = torch.zeros(64)

    edit_tensors(base / "model.safetensors", rename)
    edit_json(base / "config.json", architectures=["BertForMaskedLM"])
    described = describe_base(str(base))
    assert "pooler.dense" not in described.modules
    assert load_base(described, torch.float32).pooler is None
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({"bert.extra.weight": torch.zeros(3)}))
    with pytest.raises(
        InputError, match=r"weights in the base's files belong to no module; got (bert\.)?extra\.weight"
    ):
        load_base(describe_base(str(base)), torch.float32)


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({"architectures": ["BertForTokenClassification"]}, None, "does not say what this bert is for.*--task"),
        ({"architectures": None}, None, "does not say what this bert is for"),
        ({"is_decoder": True}, None, "is a decoder, which has no graph here"),
        ({}, Task.TEXT_GENERATION, "a bert generates no text"),
    ],
)
def test_a_task_that_cannot_be(base: Path, changes: dict[str, Any], asked: Task | None, message: str) -> None:
    edit_json(base / "config.json", **changes)
    with pytest.raises(ExportError, match=message):
        describe_base(str(base), asked)


@pytest.mark.parametrize("architecture", ["CamembertModel", "CamembertForMaskedLM", "CamembertForCausalLM"])
def test_other_encoders_are_no_generators(base: Path, architecture: str) -> None:
    """transformers has a class for generation of them, whose tokens see later ones all the same."""
    edit_json(base / "config.json", model_type="camembert", architectures=[architecture])
    with pytest.raises(ExportError, match=r"encoder, and none that has a graph here; got model_type 'camembert'; need"):
        describe_base(str(base))


def test_only_encoders_embed(tmp_path: Path) -> None:
    llama = write_base(tmp_path / "llama")
    with pytest.raises(ExportError, match=r"needs an encoder.*got 'llama'; need .*bert, distilbert"):
        describe_base(str(llama), Task.FEATURE_EXTRACTION)
    assert describe_base(str(llama)).task is Task.TEXT_GENERATION


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"emit": Emit.MODERN}, "no form in the modern operators. Fix: --emit portable"),
        ({"gate_op": OpChoice.PLUGIN}, "--gate-op plugin: no plugin of ours has been proved on an encoder"),
        ({"site_op": OpChoice.PLUGIN}, "--site-op plugin"),
        ({"router": RouterSpec(RouterKind.RANK_SELECT)}, "--router rank-select: routers inside the sites are for dec"),
        ({"hot": HotSpec(64)}, "--adapters-as inputs: adapters are inputs of decoders only"),
        ({"router": RouterSpec(RouterKind.ARROW)}, "--router arrow: routers inside the sites are for decoders"),
    ],
)
def test_settings_no_encoder_has(random_bert: EncoderCheckpoint, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read_inputs(random_bert.spec(**settings))


def test_the_flattened_rule_is_refused(tmp_path: Path) -> None:
    config = {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True, "peft_version": "0.17.0"}
    checkpoint = write_random(tmp_path, **config)
    spec = checkpoint.spec(topk_softmax=TopkSoftmax.FLATTENED, cache=CacheChoice.NONE)
    with pytest.raises(ExportError, match="makes a text's scalings depend on all others in its batch"):
        read_inputs(spec)


def test_pooling_is_of_embeddings(tmp_path: Path) -> None:
    checkpoint = write_random(tmp_path, classes=2)
    with pytest.raises(ExportError, match="--pooling: only embeddings are pooled"):
        read_inputs(checkpoint.spec(pooling=Pooling.CLS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": ("cls_token", "mean_tokens")}, "got pooling_mode_cls_token, pooling_mode_mean_tokens; need one of"),
        ({"modes": ("lasttoken",)}, "got pooling_mode_lasttoken"),
        ({"modes": ()}, "no pooling mode"),
    ],
)
def test_a_sentence_layout_that_has_no_graph(base: Path, change: dict[str, Any], message: str) -> None:
    write_sentence_layout(base, **change)
    with pytest.raises(ExportError, match=message):
        describe_base(str(base))


def edit_second(file: Path, **changes: Any) -> None:
    modules = json.loads(file.read_text())
    modules[1] |= changes
    file.write_text(json.dumps(modules))


def test_other_sentence_modules_are_refused(base: Path) -> None:
    write_sentence_layout(base)
    edit_second(base / "modules.json", type="sentence_transformers.models.Dense")
    with pytest.raises(ExportError, match="got modules Transformer, Dense, Normalize; need Transformer, Pooling"):
        describe_base(str(base))
    edit_second(base / "modules.json", type="sentence_transformers.models.Pooling", path="../elsewhere")
    with pytest.raises(ExportError, match="need folders inside this one"):
        describe_base(str(base))
    (base / "modules.json").write_text('{"a": 1}')
    with pytest.raises(ExportError, match="no list of modules"):
        describe_base(str(base))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"do_lower_case": True}, "do_lower_case"), ({"max_seq_length": "many"}, "max_seq_length 'many'")],
)
def test_sentence_settings_are_strict(base: Path, changes: dict[str, Any], message: str) -> None:
    write_sentence_layout(base)
    edit_json(base / "sentence_bert_config.json", **changes)
    with pytest.raises(ExportError, match=message):
        describe_base(str(base))


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "xlm-roberta"])
def test_the_first_versions_sentence_settings(base: Path, kind: str) -> None:
    """They named the file after the model."""
    write_sentence_layout(base)
    (base / "sentence_bert_config.json").rename(base / f"sentence_{kind}_config.json")
    described = describe_base(str(base)).sentence
    assert described is not None
    assert described.max_tokens == 48


def test_no_text_is_longer_than_the_positions(base: Path) -> None:
    write_sentence_layout(base)
    for asked, longest in ((512, 66), (48, 48)):
        edit_json(base / "sentence_bert_config.json", max_seq_length=asked)
        info = encoder_info(describe_base(str(base)), BuildSpec())
        assert info is not None
        assert info.max_tokens == longest


def test_a_default_prompt_is_refused(base: Path) -> None:
    """sentence-transformers would put it before every text; the bundle would not, and nobody would see it."""
    write_sentence_layout(base)
    file, prompts = base / "config_sentence_transformers.json", {"query": "query: ", "document": ""}
    file.write_text(json.dumps({"prompts": prompts, "default_prompt_name": "query"}))
    with pytest.raises(ExportError, match=r"default_prompt_name 'query', which puts 'query: ' before every text"):
        describe_base(str(base))
    for name in ("document", None):
        edit_json(file, default_prompt_name=name)
        assert describe_base(str(base)).sentence is not None


def test_newer_sentence_layout_and_flags(base: Path) -> None:
    write_sentence_layout(base, normalize=False)
    (base / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    sentence = describe_base(str(base)).sentence
    assert sentence is not None
    assert (sentence.pooling, sentence.normalize, sentence.max_tokens) == (Pooling.CLS, False, 48)


@pytest.mark.parametrize(
    ("labels", "message"), [({"0": "a", "1": "a"}, "id2label does not name"), ({"0": "a", "2": "b"}, "id2label")]
)
def test_labels_must_name_every_column(tmp_path: Path, labels: dict[str, str], message: str) -> None:
    base = write_encoder(tmp_path / "base", classes=2)
    edit_json(base / "config.json", id2label=labels, label2id=...)
    with pytest.raises(ExportError, match=message):
        labels_of(describe_base(str(base)))


@pytest.mark.parametrize(
    ("kind", "count", "scores"),
    [
        (None, 3, Scores.SOFTMAX),
        (None, 1, Scores.SIGMOID),
        ("multi_label_classification", 3, Scores.SIGMOID),
        ("regression", 1, Scores.NONE),
        ("single_label_classification", 2, Scores.SOFTMAX),
    ],
)
def test_scores_are_those_of_transformers_pipeline(kind: str | None, count: int, scores: Scores) -> None:
    from transformers import BertConfig

    assert scores_of(BertConfig(problem_type=kind, num_labels=count)) is scores
    logits = np.array([[-1.0, 2.0, 900.0][:count]], np.float32)
    wanted = {
        Scores.SOFTMAX: torch.tensor(logits).softmax(-1),
        Scores.SIGMOID: torch.tensor(logits).sigmoid(),
        Scores.NONE: torch.tensor(logits),
    }
    assert np.allclose(scores_from(logits, scores), wanted[scores], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"pad_token_id": None}, "max_position_embeddings 66, padding token None"),
        ({"max_position_embeddings": 2}, "max_position_embeddings 2, padding token 1"),
        ({"pad_token_id": 65}, "max_position_embeddings 66, padding token 65"),
    ],
)
def test_a_padding_token_that_leaves_no_positions(tmp_path: Path, changes: dict[str, Any], got: str) -> None:
    described = describe_base(str(write_encoder(tmp_path / "base", "roberta")))
    for name, value in changes.items():
        setattr(described.config, name, value)
    with pytest.raises(ExportError, match=f"no position is left for a text; got {got}; need positions beyond"):
        positions_of(described)


def test_a_feed_forward_in_chunks_is_refused(tmp_path: Path) -> None:
    checkpoint = write_random(tmp_path)
    edit_json(checkpoint.base / "config.json", chunk_size_feed_forward=2)
    with pytest.raises(ExportError, match=r"chunks of the feed-forward are a loop.*got chunk_size_feed_forward 2"):
        read_inputs(checkpoint.spec())


def test_positions_of_families(tmp_path: Path) -> None:
    counts = {"bert": 66, "distilbert": 66, "roberta": 64, "mpnet": 64}
    for family, count in counts.items():
        assert positions_of(describe_base(str(write_encoder(tmp_path / family, family)))) == count


def test_text_generation_commands_refuse_encoders(
    classifier: EncoderBuilt, embedder: EncoderBuilt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, xlora = str(classifier.bundle.root), str(classifier.checkpoint.xlora)
    base = ["--base", str(classifier.checkpoint.base), "--adapters", xlora]
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "up"}\n')
    runs = {
        ("runtime", "generate", bundle, "--prompt", "up"): "for another task.*python -m runtime classify",
        ("runtime", "embed", bundle, "--text", "up"): "for another task.*use classify",
        ("runtime", "classify", str(embedder.bundle.root), "--text", "up"): "for another task.*use embed",
        ("exporter", "record", bundle, *base, "--out", str(tmp_path / "r.npz")): "record works on text generation only",
        (
            "exporter",
            "analyze",
            bundle,
            "--data",
            str(data),
            "--out",
            str(tmp_path / "a"),
        ): "cannot be analysed; got text-",
        ("exporter", "learn-mix", *base, "--data", str(data), "--out", str(tmp_path / "m.json")): "learn-mix works on",
    }
    for (room, *words), message in runs.items():
        assert (main if room == "runtime" else exporter_main)(words) == 2
        captured = capsys.readouterr()
        assert re.search(message, captured.err), captured.err
        assert not captured.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_a_generator_does_not_embed(tmp_path: Path) -> None:
    root = tiny_bundle(tmp_path / "tiny")
    with pytest.raises(InputError, match=r"for another task; got text-generation.*python -m runtime generate"):
        load_encoder(root)


def test_commands(
    classifier: EncoderBuilt, embedder: EncoderBuilt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they print is what the functions give; one call may hold several variants."""
    root, texts = str(embedder.bundle.root), ["up down", "sweet"]
    (tmp_path / "texts.txt").write_text("up down\nsweet\n")
    file = tmp_path / "out.npy"
    with load_encoder(root, threads=1) as encoder:
        wanted = embed(encoder, texts)
    assert main(["embed", root, "--text-file", str(tmp_path / "texts.txt"), "--out", str(file), "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(file)
    assert "verified, level quick" in captured.err
    assert np.abs(np.load(file) - wanted).max() <= 1e-6
    assert main(["embed", root, "--text", texts[0], "--variant", "base", "--variant", "xlora", "-q"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["variant"] for line in lines] == ["base", "xlora"]
    assert np.abs(np.array(lines[1]["embedding"]) - wanted[0]).max() <= 1e-6
    assert np.abs(np.array(lines[0]["embedding"]) - wanted[0]).max() > 1e-3
    words = ["classify", str(classifier.bundle.root), "--text", "sweet sweet bitter word1", "-q"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("more  0.9")
    assert main([*words, "--mix", "taste=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "more"
    assert main([*words, "--pair", "up", "--variant", "static"]) == 0
    assert capsys.readouterr().out.startswith(("more", "less"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no text. Fix: give --text"),
        (
            ["--text", "up " * 60],
            "text 1: .*too long for the model; got 62 tokens, special ones included; need at most 48",
        ),
        (["--text", "a", "--pair", "b", "--pair", "c"], "every --text needs its own --pair"),
        (["--text", "a", "--text-file", "nowhere.txt"], "cannot read the texts"),
        (["--text", "a", "--variant", "poetry"], "no variant 'poetry'"),
        (["--text", "a", "--mix", "poetry=1"], "no expert 'poetry'"),
        (["--text", "a", "--batch-size", "0"], "batch_size"),
        (["--text", "a", "--threads", "0"], "threads"),
        (["--text", "a", "--graph", "dynamic", "--variant", "base"], "a variant names its graph"),
        (["--text", "a", "--backend", "trt-rtx"], "encoders run on ONNX Runtime only"),
        (["--text", "a", "--out", "nowhere/x.npy"], "cannot write there"),
        (["--text", "a", "--out", "x.json"], "need FILE.npy"),
    ],
)
def test_bad_requests_are_one_line(
    embedder: EncoderBuilt, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", str(embedder.bundle.root), *words]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    error = [line for line in captured.err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert re.search(message, captured.err), captured.err


def test_truncation_keeps_the_special_tokens(embedder: EncoderBuilt) -> None:
    with load_encoder(embedder.bundle.root, threads=1) as encoder:
        assert encoder.text is not None
        long = "up down " * 40
        ids, types = encoder.text.encode_pair(long, None, 48)
        assert (len(ids), ids[0], ids[-1]) == (48, 2, 3)
        cut = embed(encoder, [long], EncodeOptions(truncate=True))
        assert np.abs(cut - embed(encoder, [EncodedText(tuple(ids), tuple(types))])).max() == 0
        with pytest.raises(InputError, match="too long"):  # cutting is never left on
            embed(encoder, [long])


def test_bad_tokens_are_refused(embedder: EncoderBuilt) -> None:
    with load_encoder(embedder.bundle.root, threads=1) as encoder:
        for text, message in (
            (EncodedText((), ()), "the text is empty"),
            (EncodedText((2, 64), (0, 0)), "unknown token ids; got .64."),
            (EncodedText((2, 3), (0, 2)), "token types do not fit"),
            (EncodedText((2, 3), (0,)), "token types do not fit"),
        ):
            with pytest.raises(InputError, match=message):
                embed(encoder, [text])
        with pytest.raises(InputError, match="need a list of texts"):
            embed(encoder, "one")
        with pytest.raises(InputError, match="no text"):
            embed(encoder, [])
        with pytest.raises(InputError, match="its own mix"):
            EncodeOptions(variant="base", mix={})
        with pytest.raises(InputError, match="a variant says how"):
            embed(encoder, [Variant("up", "base", {})])


def test_a_session_checks_what_it_is_given(embedder: EncoderBuilt, tmp_path: Path) -> None:
    [graph] = embedder.bundle.manifest.graphs
    settings = SessionSettings(48, threads=1)
    session = EncoderSession(embedder.bundle.file(graph.path), graph.signature, settings)
    rows = TextRows.of([EncodedText((2, 3), (0, 0))])
    with pytest.raises(InputError, match="scalings have a wrong shape for this graph; got none"):
        session.run(rows, None)
    with pytest.raises(InputError, match="too long for the model"):
        session.run(TextRows.of([EncodedText((2,) * 49, (0,) * 49)]), None)
    with pytest.raises(InputError, match="no text at all"):
        session.run(TextRows.of([]), None)
    broken = copy_of(embedder.bundle.root, tmp_path)
    edit_weight(
        broken, "embeddings.word_embeddings.weight", lambda rows: np.where(np.arange(64)[:, None] == 9, np.nan, rows)
    )
    session = EncoderSession(broken / graph.path, graph.signature, settings)
    texts = [EncodedText((2, 3), (0, 0)), EncodedText((2, 9, 3), (0, 0, 0))]
    routing = route_for(embedder.bundle.manifest, graph, "base", None).routing
    with pytest.raises(NumericError, match="embeddings is not finite for row 1"):
        encode_batch(session, texts, [routing] * 2)


def test_a_text_that_is_not_finite_is_named(embedder: EncoderBuilt, tmp_path: Path) -> None:
    """As the caller numbers them, not as they run: gated rows first, short ones first."""
    broken = copy_of(embedder.bundle.root, tmp_path)
    edit_weight(
        broken, "embeddings.word_embeddings.weight", lambda rows: np.where(np.arange(64)[:, None] == 9, np.nan, rows)
    )
    reseal(broken)
    good, bad = EncodedText((2, 3), (0, 0)), EncodedText((2, 9, 3), (0, 0, 0))
    with load_encoder(broken, threads=1) as encoder:
        routings = [route_for(encoder.manifest, encoder.graph, name, None).routing for name in ("base", "xlora")]
        for row, batch in enumerate(([bad, good], [good, bad])):
            with pytest.raises(NumericError, match=f"embeddings is not finite for row {row} "):
                encode_batch(encoder.session, batch, routings)
        long = EncodedText((2, 5, 5, 5, 3), (0,) * 5)
        texts = [Variant(long, "base"), Variant(bad, "base"), Variant(good, "xlora"), Variant(good, "base")]
        with pytest.raises(NumericError, match="embeddings is not finite for text 2"):
            embed(encoder, texts, EncodeOptions(batch_size=3))


def test_labels_cannot_write_to_the_terminal(
    classifier: EncoderBuilt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(classifier.bundle.root, tmp_path)
    manifest = read_manifest((root / "manifest.json").read_bytes())
    info = manifest.encoder.model_copy(update={"labels": ("\x1b[2J", "a\nb")})
    (root / "manifest.json").write_bytes(manifest_bytes(manifest.model_copy(update={"encoder": info})))
    reseal(root)
    assert main(["classify", str(root), "--text", "up up down", "-q"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["classify", str(root), "--text", "down", "-q"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_no_part_of_a_file_is_left(embedder: EncoderBuilt, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.npy").mkdir()
    words = ["embed", str(embedder.bundle.root), "--text", "up", "--out", str(tmp_path / "folder.npy"), "-q"]
    assert main(words) == 2
    assert "cannot write the embeddings" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.npy"]


def test_what_bundles_and_checkpoints_say(classifier: EncoderBuilt, embedder: EncoderBuilt) -> None:
    text = render_bundle(embedder.bundle)
    assert "feature-extraction, texts of up to 48 tokens" in text
    assert "mean pooling, normalised to length 1" in text
    assert "labels" in render_bundle(classifier.bundle)
    assert "2: less, more; scores: softmax" in render_bundle(classifier.bundle)
    assert "text-classification" in render(inspect_checkpoint(classifier.checkpoint.base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": Task.TEXT_GENERATION}, "encoder.*does not fit the task text-generation"),
        ({"encoder": None}, "does not fit the task feature-extraction"),
        ({"task": Task.TEXT_CLASSIFICATION}, "not both"),
    ],
)
def test_a_manifest_must_agree_with_itself(embedder: EncoderBuilt, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_manifest(manifest_bytes(embedder.bundle.manifest.model_copy(update=change)))


def test_a_tampered_golden_set_is_no_json(embedder: EncoderBuilt, tmp_path: Path) -> None:
    broken = copy_of(embedder.bundle.root, tmp_path)
    (broken / ENCODED_PATH).write_text('{"cases": 1}')
    reseal(broken)
    with pytest.raises(InputError, match="the golden set is not readable"):
        read_encoded(open_bundle(broken))


def test_a_wrong_backend_and_wrong_task_in_python(classifier: EncoderBuilt) -> None:
    with pytest.raises(InputError, match="no such backend"):
        load_encoder(classifier.bundle.root, backend="paper")
    with pytest.raises(InputError, match="for another task"):
        load(classifier.bundle.root)
    with load_encoder(classifier.bundle.root, threads=1) as encoder:
        with pytest.raises(InputError, match="use classify"):
            embed(encoder, ["up"])
        assert classify(encoder, ["up"])[0].variant is None
