"""The encoders' oracle against PEFT: its LoRA on the models themselves, its X-LoRA on BERT under a name it can load."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from transformers import BertConfig, BertModel, PreTrainedModel

from exporter.build_bundle import build
from exporter.errors import ExportError
from exporter.inputs import read_inputs
from exporter.parts import load_parts
from exporter.spec import AdapterSource, BuildSpec
from runtime.encode import EncodeOptions, Variant, classify, load_encoder
from runtime.encoder_session import EncodedText
from runtime.manifest import Mode, VerifyLevel
from tests.exporter.checkpoint_makers import edit_tensors
from tests.exporter.encoder_makers import (
    HIDDEN,
    SIZES,
    TARGETS,
    EncoderBuilt,
    encoded,
    load_encoder_model,
    reference_of,
    save_gate,
    write_encoder,
    write_encoder_lora,
    write_words,
)
from tests.exporter.tiny_builds import named_sources

LIMIT = 1e-5
TEXTS = ("up down", "sweet bitter word1 word2 loud word3 quiet", "loud")


def unpadded(batch: dict[str, torch.Tensor]) -> list[EncodedText]:
    """The rows of a batch by themselves."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return [EncodedText(tuple(row), (0,) * len(row)) for row in rows]


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet"])
def test_one_hot_reference_is_peft(tmp_path: Path, family: str, classes: int) -> None:
    """Single experts, those on pooler and head included, on a padded batch; a mix is PEFT's concatenated adapter."""
    base = write_encoder(tmp_path / "base", family, classes=classes)
    write_words(base)
    experts = {
        f"e{e}": write_encoder_lora(tmp_path / f"e{e}", base, targets, 2 + e, seed=e, use_rslora=e == 1)
        for e, targets in enumerate(TARGETS[family])
    }
    spec = BuildSpec(named_sources(experts), str(base))
    reference = reference_of(load_parts(read_inputs(spec)))
    batch = encoded(base, TEXTS)
    if "roberta" in family or family == "mpnet":  # their padding token is 1
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)
    model = PeftModel.from_pretrained(load_encoder_model(base), experts["e0"], adapter_name="e0").eval()
    model.load_adapter(experts["e1"], adapter_name="e1")
    model.add_weighted_adapter(["e0", "e1"], [0.75, 0.4], "mix", combination_type="cat")
    rows = {"e0": [1.0, 0.0], "e1": [0.0, 1.0]}
    for name, row in rows.items():
        model.set_adapter(name)
        with torch.no_grad():
            out = model(**batch)
        for number, text in enumerate(unpadded(batch)):
            got = reference.constant(row, text).logits[0]
            wanted = out.logits[number] if classes else out.last_hidden_state[number, : len(text)].mean(0)
            assert float((got - wanted).abs().max()) <= LIMIT
            other = reference.constant([0.0, 0.0], text).logits[0]
            assert float((other - wanted).abs().max()) > 1e3 * LIMIT


class Named(PreTrainedModel):  # type: ignore[misc]
    """BERT under `model`, the only name under which PEFT's X-LoRA finds the experts' tensors."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)

    def prepare_inputs_for_generation(self, *_: Any, **__: Any) -> None:
        """PEFT asks for it."""


@pytest.mark.parametrize(
    "settings",
    [
        {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16},
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True, "scaling_pass_value": 0.4},
        {"layerwise_scalings": True, "softmax_temperature": 0.7, "global_scaling_weight": 1.5},
    ],
)
def test_gated_reference_is_pefts_xlora(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A padded batch of PEFT's own X-LoRA classes equals each text alone in ours."""
    torch.manual_seed(0)
    named = Named(BertConfig(**SIZES, use_cache=False)).eval()
    with torch.no_grad():
        for parameter in named.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    base, experts, theirs = tmp_path / "base", {}, {}
    named.model.save_pretrained(base)
    write_words(base)
    for e, targets in enumerate((["query", "value"], ["key", "intermediate.dense"], ["query", "output.dense"])):
        model = get_peft_model(_copy(named), LoraConfig(r=2 + e, lora_alpha=6, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn_like(parameter)
        theirs[str(e)] = str(tmp_path / f"theirs{e}")
        model.save_pretrained(theirs[str(e)])
        experts[f"e{e}"] = Path(shutil.copytree(theirs[str(e)], tmp_path / f"e{e}"))
        edit_tensors(experts[f"e{e}"] / "adapter_model.safetensors", _without_model)
    config = XLoraConfig(hidden_size=HIDDEN, adapters=theirs, **settings)
    oracle = get_peft_model(_copy(named), config)
    classifier = oracle.base_model.internal_xlora_classifier
    for parameter in classifier.parameters():
        parameter.data.normal_(0, 0.5)
    tensors = {name.removeprefix("layers."): value.clone() for name, value in classifier.state_dict().items()}
    xlora = save_gate(tmp_path / "xlora", base, experts, tensors, **settings)
    spec = BuildSpec((AdapterSource(xlora),), str(base), verify=VerifyLevel.QUICK, threads=1)
    reference = reference_of(load_parts(read_inputs(spec)))
    batch = encoded(base, TEXTS)
    with torch.no_grad():
        hidden = oracle(**batch).last_hidden_state
    for number, text in enumerate(unpadded(batch)):
        wanted = hidden[number, : len(text)].mean(0)
        assert float((reference.gated(text).logits[0] - wanted).abs().max()) <= LIMIT
        for row in ([0.0] * 3, [1 / 3] * 3):
            assert float((reference.constant(row, text).logits[0] - wanted).abs().max()) > 1e3 * LIMIT


def _copy(model: Named) -> Named:
    other = Named(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def _without_model(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("base_model.model.model.", "base_model.model.")] = tensors.pop(name)


def test_peft_itself_loads_no_xlora_on_bert(tmp_path: Path) -> None:
    """Why the oracle is our own: PEFT 0.21.2 looks for the experts' tensors under `model.` only."""
    base = write_encoder(tmp_path / "base")
    expert = write_encoder_lora(tmp_path / "expert", base, ("query",))
    model = load_encoder_model(base)
    model.config.use_cache = False
    with pytest.raises(ValueError, match="unexpected keys"):
        get_peft_model(model, XLoraConfig(hidden_size=HIDDEN, adapters={"0": str(expert)}))


def test_heads_that_peft_saves_with_every_classifier(tmp_path: Path) -> None:
    """SEQ_CLS saves the head: the base's own is no obstacle, a trained one goes into static graphs alone.

    The base's bias is zero, as that of every fresh head: no rewrite may leave it out, the trained one is not.
    """
    base = write_encoder(tmp_path / "base", classes=3)
    write_words(base)
    edit_tensors(base / "model.safetensors", lambda tensors: tensors["classifier.bias"].zero_())
    experts = {
        name: write_encoder_lora(tmp_path / name, base, ("query", "value"), seed=seed, task_type="SEQ_CLS")
        for seed, name in enumerate(("own", "trained"))
    }
    edit_tensors(experts["trained"] / "adapter_model.safetensors", _train_head)
    own = BuildSpec(named_sources({"own": experts["own"]}), str(base), verify=VerifyLevel.QUICK, threads=1)
    inputs = read_inputs(own)
    assert "expert own: classifier.bias, classifier.weight saved beside the LoRA equal the base's" in inputs.notes
    assert not inputs.adapters.experts[0].replacements
    both = replace(own, adapters=named_sources(experts))
    with pytest.raises(ExportError, match=r"trained replaces classifier.bias, classifier.weight .*scalings cannot"):
        read_inputs(both)
    with pytest.raises(ExportError, match="trained cannot be mixed"):
        read_inputs(replace(both, modes=(Mode.STATIC,), mix={"trained": 0.5, "own": 0.5}))
    bundle = build(replace(both, modes=(Mode.STATIC,), mix={"trained": 1.0}, out=tmp_path / "bundle"))
    model = PeftModel.from_pretrained(load_encoder_model(base), experts["trained"]).eval()
    with torch.no_grad():
        wanted = model(**encoded(base, TEXTS)).logits
        plain = load_encoder_model(base)(**encoded(base, TEXTS)).logits
    with load_encoder(bundle.root, threads=1) as encoder:
        found = classify(encoder, [Variant(text) for text in TEXTS], EncodeOptions(batch_size=2))
    got = torch.tensor([one.logits for one in found])
    assert float((got - wanted).abs().max()) <= LIMIT
    assert float((got - plain).abs().max()) > 1e3 * LIMIT
    scores = wanted.softmax(-1)
    labels = json.loads((base / "config.json").read_text())["id2label"]
    for one, row in zip(found, scores, strict=True):
        assert one.label == labels[str(int(row.argmax()))]
        assert one.score == pytest.approx(float(row.max()), abs=1e-5)
        assert sum(one.scores.values()) == pytest.approx(1, abs=1e-5)


def test_a_saved_mix_is_a_lora_that_peft_loads(classifier: EncoderBuilt) -> None:
    base = classifier.checkpoint.base
    with torch.no_grad():
        plain = load_encoder_model(base)(**encoded(base, TEXTS)).logits
        wanted = (
            PeftModel.from_pretrained(load_encoder_model(base), base.parent / "saved")
            .eval()(**encoded(base, TEXTS))
            .logits
        )
    with load_encoder(classifier.bundle.root, threads=1) as encoder:
        found = classify(encoder, TEXTS, EncodeOptions(variant="static"))
    got = torch.tensor([one.logits for one in found])
    assert float((got - wanted).abs().max()) <= LIMIT
    assert float((got - plain).abs().max()) > 1e3 * LIMIT


def _train_head(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "classifier" in name:
            tensors[name] = tensors[name] + 0.5 * torch.randn(
                tensors[name].shape, generator=torch.Generator().manual_seed(1)
            )
