"""Encoders: every graph is the reference, whatever shares its batch; adapters matter, and one bug each is seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from exporter.adapters import AdapterSet
from exporter.build_bundle import build
from exporter.encoder import MASKED, pooled, traced_encoder
from exporter.encoder_reference import EncoderReference
from exporter.encoder_verification import EncoderVerification, measure
from exporter.errors import VerifyError
from exporter.inputs import read_inputs
from exporter.parts import load_parts, make_verification
from exporter.sites import SiteKind
from exporter.spec import BuildSpec, DType
from exporter.verify_bundle import verify_bundle
from runtime.encode import EncodeOptions, Encoder, Variant, classify, embed, load_encoder
from runtime.encode_golden import read_encoded, replay_encoded
from runtime.encoder_passes import encode_batch
from runtime.encoder_session import EncodedText, EncoderSession, TextRows
from runtime.manifest import EncoderInfo, Mode, Pooling, Scores, Task, VerifyLevel
from runtime.routing import route_for
from runtime.session import SessionSettings
from runtime.signature import EMBEDDINGS, GATE, LENGTHS, LOGITS, SCALINGS, TOKEN_TYPE_IDS
from tests.exporter.checkpoint_makers import write_xlora_original
from tests.exporter.encoder_makers import (
    SOUND,
    TARGETS,
    TASTE,
    EncoderBuilt,
    EncoderCheckpoint,
    encoded,
    load_encoder_model,
    reference_of,
    task_batch,
    write_encoder,
    write_encoder_lora,
    write_random,
    write_words,
)
from tests.exporter.mutations import bypass, constant, edit_graph, edit_weight, nodes
from tests.exporter.reseal import reseal
from tests.exporter.tiny_builds import named_sources

LIMIT = 1e-5  # fp32, on outputs of size 1
TEXTS = ("sweet", "loud quiet word1 word2 word3 loud", "up down " * 10, "bitter word7 sweet sweet")
OPTIONS = EncodeOptions(batch_size=8)


def text_of(encoder: Encoder, text: str) -> EncodedText:
    assert encoder.text is not None
    ids, types = encoder.text.encode_pair(text, None)
    return EncodedText(tuple(ids), tuple(types))


def expected(reference: EncoderReference, encoder: Encoder, text: str, variant: str) -> np.ndarray:
    """The oracle's vector of one text alone, unpadded."""
    tokens = text_of(encoder, text)
    if variant == "xlora":
        return reference.gated(tokens).logits[0].numpy()
    [info] = (each for each in encoder.manifest.variants if each.name == variant)
    [graph] = (each for each in encoder.manifest.graphs if each.name == info.graph)
    mix = info.mix.weights if info.mix else graph.mix
    assert mix is not None
    return reference.constant([mix.get(e.name, 0.0) for e in reference.experts], tokens).logits[0].numpy()


def outputs(encoder: Encoder, texts: Sequence[Variant]) -> np.ndarray:
    if encoder.manifest.task is Task.FEATURE_EXTRACTION:
        return embed(encoder, texts, OPTIONS)
    return np.array([found.logits for found in classify(encoder, texts, OPTIONS)], np.float32)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def silenced(adapters: AdapterSet, column: int) -> AdapterSet:
    """The set with one expert that changes nothing; its sites and its column stay."""
    experts = list(adapters.experts)
    deltas = {path: replace(delta, scale=0.0) for path, delta in experts[column].deltas.items()}
    experts[column] = replace(experts[column], deltas=deltas)
    return replace(adapters, experts=tuple(experts))


def assert_is_reference(built: EncoderBuilt, texts: Sequence[str] = TEXTS) -> None:
    """All variants of all texts in one call equal the oracle, far from the base; a dropped expert is seen."""
    parts = built.parts()
    reference = reference_of(parts)
    adapters = silenced(parts.inputs.adapters, 0)
    crippled = reference_of(replace(parts, inputs=replace(parts.inputs, adapters=adapters)))
    with load_encoder(built.bundle.root, threads=1) as encoder:
        names = [variant.name for variant in encoder.manifest.variants]
        got = outputs(encoder, [Variant(text, name) for text in texts for name in names])
        for row, (text, name) in zip(got, [(text, name) for text in texts for name in names], strict=True):
            assert apart(row, expected(reference, encoder, text, name)) <= LIMIT, (name, text)
        bases = [expected(reference, encoder, text, "base") for text in texts]
        gated = [expected(reference, encoder, text, "xlora") for text in texts]
        dropped = [expected(crippled, encoder, text, "xlora") for text in texts]
        assert min(map(apart, gated, bases)) > 1e3 * LIMIT
        assert min(map(apart, gated, dropped)) > 10 * LIMIT
        assert max(map(apart, gated, dropped)) > 1e3 * LIMIT


@pytest.mark.parametrize(
    ("family", "classes"),
    [
        ("mpnet", 0),
        pytest.param("distilbert", 2, marks=pytest.mark.long),
        pytest.param("roberta", 3, marks=pytest.mark.long),
        pytest.param("xlm-roberta", 0, marks=pytest.mark.long),
        pytest.param("distilbert", 0, marks=pytest.mark.long),
        pytest.param("mpnet", 3, marks=pytest.mark.long),
    ],
)
def test_every_family_is_the_reference(tmp_path: Path, family: str, classes: int) -> None:
    checkpoint = write_random(tmp_path, family, classes=classes)
    built = EncoderBuilt(checkpoint, build(checkpoint.spec(out=tmp_path / "bundle")))
    manifest = built.bundle.manifest
    assert manifest.base.model_type == family
    assert manifest.task is (Task.TEXT_CLASSIFICATION if classes else Task.FEATURE_EXTRACTION)
    kinds = {site.kind for site in manifest.sites}
    assert kinds == ({"linear"} if family == "distilbert" and not classes else {"linear", "first_token"})
    [report] = manifest.reports
    assert report.adapters_matter > 0.1
    assert all(check.value <= check.limit / 3 for check in report.checks)
    assert manifest.graphs[0].signature.input(TOKEN_TYPE_IDS) is None
    assert_is_reference(built)


def test_positions_reach_the_models_last_one(tmp_path: Path) -> None:
    """RoBERTa numbers what is no padding token; 64 of its 66 position embeddings are usable."""
    checkpoint = write_random(tmp_path, "roberta", layerwise=False)
    bundle = build(checkpoint.spec(out=tmp_path / "bundle"))
    assert_is_reference(EncoderBuilt(checkpoint, bundle))
    assert (bundle.manifest.base.max_positions, bundle.manifest.encoder.max_tokens) == (64, 64)
    model = load_encoder_model(checkpoint.base)
    with load_encoder(bundle.root, threads=1) as encoder:
        for ids in ([*range(2, 64), 2, 3], [5, 1, 1, 7, 1]):  # 1 is the padding token, as a text may have it
            with torch.no_grad():
                wanted = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
            text = EncodedText(tuple(ids), (0,) * len(ids))
            assert apart(embed(encoder, [Variant(text, "base")])[0], wanted) <= LIMIT


def test_trained_experts_and_their_gate_do_their_tasks(classifier: EncoderBuilt) -> None:
    texts, labels = task_batch([TASTE, SOUND], 200, seed=9)
    right = {}
    with load_encoder(classifier.bundle.root, threads=1) as encoder:
        for name in ("base", "taste", "sound", "xlora"):
            found = classify(encoder, texts, EncodeOptions(variant=name))
            right[name] = sum((one.label == "more") == bool(label) for one, label in zip(found, labels, strict=True))
    assert right["xlora"] >= 190
    assert max(right["base"], right["taste"], right["sound"]) <= 175


def test_classifier_is_the_reference(classifier: EncoderBuilt) -> None:
    manifest = classifier.bundle.manifest
    assert [graph.mode for graph in manifest.graphs] == [Mode.DYNAMIC, Mode.STATIC]
    assert (manifest.encoder.labels, manifest.encoder.scores) == (("less", "more"), Scores.SOFTMAX)
    assert manifest.graphs[0].signature.output(LOGITS).shape == ("B", 2)
    assert {variant.name for variant in manifest.variants} == {"base", "taste", "sound", "half", "xlora", "static"}
    assert_is_reference(classifier)


def test_embedder_is_the_reference(embedder: EncoderBuilt) -> None:
    manifest, signature = embedder.bundle.manifest, embedder.bundle.manifest.graphs[0].signature
    assert (manifest.encoder.pooling, manifest.encoder.normalize, manifest.encoder.max_tokens) == (
        Pooling.MEAN,
        True,
        48,
    )
    assert signature.output(EMBEDDINGS).shape == ("B", 32)
    assert signature.output(GATE).shape == ("B", "S", len(manifest.sites), 2)
    assert signature.input(LENGTHS).shape == ("B",)
    assert signature.carries == ()
    assert "pooler.dense" in {site.path for site in manifest.sites}
    assert_is_reference(embedder)


@pytest.mark.parametrize("name", ["classifier", "embedder"])
def test_rows_do_not_change_each_other(name: str, request: pytest.FixtureRequest) -> None:
    """All pairs of variants in one batch, a short text beside a long one: each row equals the same text alone."""
    built: EncoderBuilt = request.getfixturevalue(name)
    short, long = TEXTS[0], TEXTS[2]
    with load_encoder(built.bundle.root, threads=1) as encoder:
        rows = [variant.name for variant in encoder.manifest.variants if variant.graph == "dynamic"]
        alone = {
            (text, variant): outputs(encoder, [Variant(text, variant)])[0] for text in (short, long) for variant in rows
        }
        for first, second in combinations(rows, 2):
            got = outputs(encoder, [Variant(short, first), Variant(long, second)])
            assert apart(got[0], alone[short, first]) <= 1e-6
            assert apart(got[1], alone[long, second]) <= 1e-6
            assert apart(alone[short, first], alone[short, second]) > 1e-3, "variants that hardly differ prove nothing"


def test_a_texts_own_mix_comes_before_the_others(embedder: EncoderBuilt) -> None:
    text = TEXTS[1]
    with load_encoder(embedder.bundle.root, threads=1) as encoder:
        base, alone = embed(encoder, [Variant(text, "base"), Variant(text, "expert1")])
        for options in (EncodeOptions(), EncodeOptions(variant="base"), EncodeOptions(mix={"expert0": 1.0})):
            [got] = embed(encoder, [Variant(text, mix={"expert1": 1.0})], options)
            assert apart(got, alone) <= 1e-6
            [got] = embed(encoder, [Variant(text, mix={})], options)
            assert apart(got, base) <= 1e-6
    assert apart(alone, base) > 1e-3


def test_pooler_and_head_have_the_first_tokens_scalings(tmp_path: Path) -> None:
    """Under a layerwise gate, whose scalings differ from token to token; in torch, before any export."""
    parts = load_parts(read_inputs(write_random(tmp_path, classes=3).spec()))
    assert {site.path for site in parts.sites if site.kind is SiteKind.FIRST_TOKEN} == {"bert.pooler.dense"}
    ids = [2, 9, 17, 30, 3]
    wanted = reference_of(parts).gated(EncodedText(tuple(ids), (0,) * len(ids)))
    feeds = {"input_ids": torch.tensor([[*ids, 0, 0]]), "lengths": torch.tensor([len(ids)])}
    assert parts.inputs.encoder is not None
    with torch.no_grad(), traced_encoder(parts.model, parts.sites, parts.gate, parts.inputs.encoder) as traced:
        _, gate = traced(**feeds, scalings=torch.zeros(1, 7, len(parts.sites), 2))
        logits, _ = traced(**feeds, scalings=gate)
        last, _ = traced(**feeds, scalings=gate[:, 4:5].expand_as(gate))
    assert wanted.gate is not None
    assert apart(gate[0, :5].numpy(), wanted.gate.numpy()) <= LIMIT
    assert apart(logits.numpy(), wanted.logits.numpy()) <= LIMIT
    assert apart(last.numpy(), wanted.logits.numpy()) > 1e3 * LIMIT


def test_what_stands_in_the_padding_does_not_matter(embedder: EncoderBuilt) -> None:
    """Other tokens, types and scalings at padded places: the same vector, the same gate at real tokens."""
    [graph] = embedder.bundle.manifest.graphs
    session = EncoderSession(embedder.bundle.file(graph.path), graph.signature, SessionSettings(48, threads=1))
    texts = [EncodedText((2, 9, 3), (0, 0, 0)), EncodedText(tuple(range(2, 22)), (0,) * 20)]
    routing = route_for(embedder.bundle.manifest, graph, "xlora", None).routing
    clean = encode_batch(session, texts, [routing] * 2)
    scalings = np.full((2, 20, *graph.signature.input(SCALINGS).shape[2:]), 0.5, np.float32)
    rows = TextRows.of(texts)
    before = session.run(rows, scalings)
    rows.tokens[0, 3:], rows.types[0, 3:], scalings[0, 3:] = 41, 1, 7.0
    after = session.run(rows, scalings)
    assert apart(before[0], after[0]) <= 1e-6
    assert apart(before[1][0, :3], after[1][0, :3]) <= 1e-6
    assert [row.gate.shape[0] for row in clean] == [3, 20]


def test_embeddings_are_those_of_sentence_transformers(embedder: EncoderBuilt) -> None:
    """The base variant against plain transformers with a padding mask, and mean pooling and length written out."""
    batch = encoded(embedder.checkpoint.base, TEXTS)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(embedder.checkpoint.base)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    with load_encoder(embedder.bundle.root, threads=1) as encoder:
        got = embed(encoder, TEXTS, EncodeOptions(variant="base"))
        assert apart(got, torch.nn.functional.normalize(mean, p=2, dim=1).numpy()) <= LIMIT
        assert apart(got, embed(encoder, TEXTS)) > 1e-2


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", list(Pooling))
def test_pooling_reads_real_tokens_only(pooling: Pooling, normalize: bool) -> None:
    hidden, lengths = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([7, 1, 4])
    real = torch.arange(7)[None] < lengths[:, None]
    got = pooled(hidden, real, lengths, EncoderInfo(max_tokens=9, pooling=pooling, normalize=normalize))
    for row, length in enumerate(lengths.tolist()):
        part = hidden[row, :length]
        wanted = {Pooling.MEAN: part.mean(0), Pooling.CLS: part[0], Pooling.MAX: part.amax(0)}[pooling]
        wanted = wanted / wanted.norm() if normalize else wanted
        assert apart(got[row].numpy(), wanted.numpy()) <= 1e-6


def test_pairs_of_texts_have_types(tmp_path: Path, embedder: EncoderBuilt) -> None:
    first, second = TEXTS[1], TEXTS[3]
    model = load_encoder_model(embedder.checkpoint.base)
    with load_encoder(embedder.bundle.root, threads=1) as encoder:
        ids, types = encoder.text.encode_pair(first, second)
        assert types.count(1) == len(encoder.text.encode(second)) - 1  # [SEP] ends it
        got = embed(
            encoder, [Variant((first, second), "base"), Variant(EncodedText(tuple(ids), (0,) * len(ids)), "base")]
        )
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).last_hidden_state[0]
    wanted = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
    assert apart(got[0], wanted) <= LIMIT
    assert apart(got[0], got[1]) > 1e-3


def test_static_needs_no_scalings_and_shares_its_weights(classifier: EncoderBuilt) -> None:
    static = classifier.bundle.manifest.graphs[1]
    assert static.signature.input(SCALINGS) is None
    assert static.signature.output(GATE) is None
    sizes = {path.stem: path.stat().st_size for path in (classifier.bundle.root / "weights").glob("*.safetensors")}
    assert sizes["static"] < sizes["base"]


def test_original_layout_and_experts_on_embeddings(tmp_path: Path) -> None:
    """An X-LoRA folder of the original library, top-k, rsLoRA, experts on word and position embeddings."""
    base = write_encoder(tmp_path / "base")
    write_words(base)
    targets = {"a": ("word_embeddings", "position_embeddings", "key"), "b": TARGETS["bert"][1], "c": ("value",)}
    experts = {
        name: write_encoder_lora(tmp_path / name, base, modules, 2 + e, seed=e, use_rslora=e == 0)
        for e, (name, modules) in enumerate(targets.items())
    }
    xlora = write_xlora_original(tmp_path / "xlora", base, experts, top_k_lora=2, xlora_depth=2)
    checkpoint = EncoderCheckpoint(base, experts, xlora)
    built = EncoderBuilt(checkpoint, build(checkpoint.spec(out=tmp_path / "bundle")))
    assert {site.kind for site in built.bundle.manifest.sites} == {"linear", "embedding", "first_token"}
    assert_is_reference(built)


def test_dora_switches_on_the_pooler_too(tmp_path: Path) -> None:
    base = write_encoder(tmp_path / "base", classes=3)
    write_words(base)
    experts = {
        "dora": write_encoder_lora(tmp_path / "dora", base, ("query", "dense"), use_dora=True),
        "lora": write_encoder_lora(tmp_path / "lora", base, ("dense",), seed=4),
    }
    spec = BuildSpec(named_sources(experts), str(base), threads=1, verify=VerifyLevel.QUICK, out=tmp_path / "bundle")
    bundle = build(spec)
    with load_encoder(bundle.root, threads=1) as encoder:
        for name, folder in experts.items():
            model = PeftModel.from_pretrained(load_encoder_model(base), folder).eval()
            with torch.no_grad():
                wanted = model(**encoded(base, TEXTS)).logits.numpy()
            assert apart(outputs(encoder, [Variant(text, name) for text in TEXTS]), wanted) <= LIMIT
            assert apart(outputs(encoder, [Variant(text, "base") for text in TEXTS]), wanted) > 1e-2


@pytest.mark.long
def test_fp16_build_is_its_twin_and_stays_near(tmp_path: Path, embedder: EncoderBuilt) -> None:
    """Operators equal the verified fp32 twin's but for casts, weights are its rounded ones; outputs stay fp32."""
    bundle = build(embedder.checkpoint.spec(out=tmp_path / "bundle", dtype=DType.FLOAT16))
    assert bundle.manifest.reports[0].stage == "A (fp32 twin)"
    assert {spec.dtype for spec in bundle.manifest.graphs[0].signature.outputs} == {"float32"}
    with load_encoder(bundle.root, threads=1) as half, load_encoder(embedder.bundle.root, threads=1) as full:
        got, wanted = embed(half, TEXTS), embed(full, TEXTS)
        assert ((got * wanted).sum(1) > 0.999).all()
        assert apart(got, embed(full, TEXTS, EncodeOptions(variant="base"))) > 5e-2


@pytest.mark.long
def test_bf16_build_is_its_twin(tmp_path: Path, embedder: EncoderBuilt) -> None:
    bundle = build(embedder.checkpoint.spec(out=tmp_path / "bundle", dtype=DType.BFLOAT16))
    assert bundle.manifest.reports[0].stage == "A (fp32 twin)"


Damage = Callable[[Path], None]


def value_of(value: ir.Value | None) -> object:
    known = None if value is None else value.const_value
    return known.numpy().item() if known is not None and known.size == 1 else None


def mask_lost(folder: Path) -> None:
    """Attention sees the padding."""

    def edit(graph: ir.Graph) -> None:
        masks = [node for node in nodes(graph, "Where") if value_of(node.inputs[2]) == MASKED]
        assert len(masks) == 1
        masks[0].replace_input_with(2, constant(graph, 0, np.float32))

    edit_graph(folder, edit)


def padding_is_pooled(folder: Path) -> None:
    """The sum goes over padding, too."""

    def edit(graph: ir.Graph) -> None:
        [total] = nodes(graph, "ReduceSum")
        assert total.inputs[0] is not None
        masking = total.inputs[0].producer()
        assert masking is not None
        assert masking.inputs[0] is not None
        bypass(masking, masking.inputs[0])

    edit_graph(folder, edit)


def one_expert_lost(folder: Path) -> None:
    edit_weight(folder, "encoder.layer.0.attention.self.query.lora_b", lambda b: b * 0)


def gate_row_exchanged(folder: Path) -> None:
    edit_weight(folder, "gate.layers.1.bias", lambda bias: bias[::-1].copy())


def second_type_lost(folder: Path) -> None:
    edit_weight(folder, "embeddings.token_type_embeddings.weight", lambda rows: np.stack([rows[0], rows[0]]))


@pytest.mark.parametrize(
    "damage", [mask_lost, padding_is_pooled, one_expert_lost, gate_row_exchanged, second_type_lost]
)
def test_verification_sees_one_bug(tmp_path: Path, embedder: EncoderBuilt, damage: Damage) -> None:
    folder = Path(shutil.copytree(embedder.bundle.root, tmp_path / "bundle"))
    [graph] = embedder.bundle.manifest.graphs
    verification = make_verification(embedder.parts(), embedder.checkpoint.spec(), None)
    assert isinstance(verification, EncoderVerification)
    scenarios = verification.scenarios(graph)
    measured = []
    for spoil in (False, True):
        if spoil:
            damage(folder)
        session = EncoderSession(folder / graph.path, graph.signature, SessionSettings(48, threads=1))
        report = verification.report(measure(session, verification.jobs(scenarios, graph)), graph)
        measured.append({check.name for check in report.checks if not check.passed})
    assert measured[0] == set()
    assert "output" in measured[1] or "gate" in measured[1]


def test_a_gate_that_is_not_the_golden_one_is_seen(embedder: EncoderBuilt) -> None:
    [graph] = embedder.bundle.manifest.graphs
    session = EncoderSession(embedder.bundle.file(graph.path), graph.signature, SessionSettings(48, threads=1))
    cases = read_encoded(embedder.bundle)
    assert all(check.passed for check in replay_encoded(session, cases))
    assert cases[0].gate is not None
    moved = tuple(tuple(value + 1e-3 for value in row) for row in cases[0].gate)
    checks = replay_encoded(session, [cases[0].model_copy(update={"gate": moved}), *cases[1:]])
    assert [check.name for check in checks if not check.passed] == ["golden_gate"]


def test_published_bundle_is_verified_again(tmp_path: Path, classifier: EncoderBuilt) -> None:
    results = verify_bundle(classifier.bundle.root, classifier.checkpoint.spec(), threads=1)
    assert [result.against for result in results] == ["golden set"] * 2 + ["reference forward"] * 2
    assert all(check.passed for result in results for check in result.checks)
    folder = Path(shutil.copytree(classifier.bundle.root, tmp_path / "bundle"))
    edit_weight(folder, "classifier.bias", lambda bias: bias + 0.01)
    reseal(folder)
    with pytest.raises(VerifyError, match="golden_output"):
        verify_bundle(folder, threads=1)
