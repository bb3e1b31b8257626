"""Tiny encoders with experts and gates: random ones that use every part of themselves, and one trained on two tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from exporter.encoder_reference import EncoderReference
from exporter.inputs import read_inputs
from exporter.parts import Parts, encoder_reference, load_parts
from exporter.spec import AdapterSource, BuildSpec
from runtime.bundle import Bundle
from runtime.manifest import VerifyLevel
from tests.exporter.tiny_builds import count_sites

HIDDEN = 32
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 66,
}
DISTIL_SIZES: dict[str, Any] = {
    "dim": HIDDEN,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 66,
}
# Query and value; everything called dense, pooler and head included; the feed-forward.
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bert": (("query", "value"), ("query", "dense")),
    "roberta": (("query", "value"), ("key", "dense")),
    "xlm-roberta": (("query", "value"), ("key", "dense")),
    "distilbert": (("q_lin", "v_lin"), ("q_lin", "lin1", "pre_classifier")),
    "mpnet": (("attn.q", "attn.v"), ("attn.o", "dense")),
}
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PLAIN, TASTE, SOUND = (
    ("up", "down"),
    ("sweet", "bitter"),
    ("loud", "quiet"),
)  # label 1: more of the first than the second
WORDS = (*PLAIN, *TASTE, *SOUND, *(f"word{number}" for number in range(20)))


def write_encoder(
    folder: Path, family: str = "bert", *, classes: int = 0, blocks: int = 1, seed: int = 0, **sizes: Any
) -> Path:
    """A random encoder, for embeddings or with a head for `classes`, whose norms and biases all matter."""
    names = DISTIL_SIZES if family == "distilbert" else SIZES
    padding = {"pad_token_id": 0 if family in ("bert", "distilbert") else 1}
    padding |= {"type_vocab_size": 1} if "roberta" in family else {}
    padding["n_layers" if family == "distilbert" else "num_hidden_layers"] = blocks
    config = AutoConfig.for_model(family, **(names | padding | sizes | ({"num_labels": classes} if classes else {})))
    torch.manual_seed(seed)
    model = (AutoModelForSequenceClassification if classes else AutoModel).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def load_encoder_model(base: Path) -> Any:
    """The base through transformers, by its architecture."""
    [architecture] = json.loads((base / "config.json").read_text())["architectures"]
    auto = AutoModelForSequenceClassification if architecture.endswith("Classification") else AutoModel
    return auto.from_pretrained(base).eval()


def write_encoder_lora(
    folder: Path, base: Path, targets: Sequence[str], rank: int = 3, *, seed: int = 0, **config: Any
) -> Path:
    """A LoRA with random A and B, written by PEFT; a `task_type` of SEQ_CLS saves the head, too."""
    lora = LoraConfig(r=rank, lora_alpha=5, target_modules=list(targets), **config)
    model = get_peft_model(load_encoder_model(base), lora)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def write_encoder_gate(
    folder: Path, base: Path, experts: Mapping[str, Path], *, layerwise: bool, **config: Any
) -> Path:
    """A random gate in PEFT's layout, written by hand: PEFT makes none on these models."""
    depth, inner, sites = config.get("xlora_depth", 1), 16, count_sites(experts) if layerwise else 1
    widths = [HIDDEN, *[inner] * (depth - 1), len(experts) * sites]
    generator, tensors = torch.Generator().manual_seed(5), {}
    for index in range(depth):
        tensors[f"{3 * index}.weight"] = torch.randn(widths[index + 1], widths[index], generator=generator) * 0.3
        tensors[f"{3 * index}.bias"] = torch.randn(widths[index + 1], generator=generator)
    return save_gate(folder, base, experts, tensors, layerwise_scalings=layerwise, xlora_size=inner, **config)


def save_gate(
    folder: Path, base: Path, experts: Mapping[str, Path], tensors: Mapping[str, torch.Tensor], **config: Any
) -> Path:
    """An X-LoRA folder as PEFT writes it, around these classifier layers."""
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "XLORA", "peft_version": "0.21.2", "hidden_size": HIDDEN, "xlora_dropout_p": 0.2,
        "base_model_name_or_path": str(base),
        "adapters": {str(e): str(path) for e, path in enumerate(experts.values())},
    } | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.internal_xlora_classifier.layers"
    named = {f"{prefix}.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_sentence_layout(base: Path, *, modes: Sequence[str] = ("mean_tokens",), normalize: bool = True) -> None:
    """What sentence-transformers puts beside a model."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] if normalize else [])]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(kinds)
    ]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    (base / "1_Pooling").mkdir(exist_ok=True)
    flags = {f"pooling_mode_{mode}": mode in modes for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (base / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN, **flags}))


def write_words(base: Path) -> None:
    """A tokenizer of whole words with BERT's post-processor: [CLS] a [SEP] b [SEP], types 0 and 1."""
    vocabulary = {word: number for number, word in enumerate((*SPECIALS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(base / "tokenizer.json"))
    # Without it AutoTokenizer takes the class of the base's model_type, which makes another tokenizer of the words.
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@dataclass(frozen=True, slots=True)
class EncoderCheckpoint:
    """Folders of one tiny encoder."""

    base: Path
    experts: Mapping[str, Path]
    xlora: Path

    def spec(self, **settings: Any) -> BuildSpec:
        """A quick build under the gate."""
        quick: dict[str, Any] = {"verify": VerifyLevel.QUICK, "threads": 1}
        return BuildSpec((AdapterSource(self.xlora),), str(self.base), **(quick | settings))


@dataclass(frozen=True, slots=True)
class EncoderBuilt:
    """A checkpoint and the bundle made of it."""

    checkpoint: EncoderCheckpoint
    bundle: Bundle

    def parts(self) -> Parts:
        """What the build loaded, freshly."""
        return load_parts(read_inputs(self.checkpoint.spec()))

    def reference(self) -> EncoderReference:
        """The oracle."""
        return reference_of(self.parts())


def reference_of(parts: Parts) -> EncoderReference:
    """The oracle of a loaded encoder."""
    assert parts.inputs.encoder is not None
    return encoder_reference(parts, parts.inputs.encoder)


def write_random(
    folder: Path, family: str = "bert", *, classes: int = 0, blocks: int = 1, layerwise: bool = True, **config: Any
) -> EncoderCheckpoint:
    """A random encoder with a tokenizer, two experts and a gate."""
    base = write_encoder(folder / "base", family, classes=classes, blocks=blocks)
    write_words(base)
    experts = {
        f"expert{e}": write_encoder_lora(folder / f"expert{e}", base, targets, 2 + e, seed=e)
        for e, targets in enumerate(TARGETS[family])
    }
    gate = write_encoder_gate(folder / "xlora", base, experts, layerwise=layerwise, **config)
    return EncoderCheckpoint(base, experts, gate)


def task_text(words: tuple[str, str], rng: random.Random) -> tuple[str, int]:
    """2 to 9 words, some of no meaning; which of the two words is there more often?"""
    counts = rng.sample(range(4), 2)
    text = [words[0]] * counts[0] + [words[1]] * counts[1] + rng.choices(WORDS[6:], k=rng.randint(1, 3))
    rng.shuffle(text)
    return " ".join(text), int(counts[0] > counts[1])


def task_batch(tasks: Sequence[tuple[str, str]], count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Texts of these tasks in turn, and their labels."""
    rng = random.Random(seed)
    pairs = [task_text(tasks[number % len(tasks)], rng) for number in range(count)]
    return [text for text, _ in pairs], torch.tensor([label for _, label in pairs])


def encoded(base: Path, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Padded tokens and their mask."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=0)
    found = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": torch.tensor([each.ids for each in found]),
        "attention_mask": torch.tensor([each.attention_mask for each in found]),
    }


def fit(model: Any, base: Path, task: tuple[str, str], *, steps: int, rate: float) -> None:
    """Train what is trainable on one task."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    texts, labels = task_batch([task], 64 * steps, seed=1)
    for step in range(steps):
        part = slice(64 * step, 64 * step + 64)
        loss = torch.nn.functional.cross_entropy(model(**encoded(base, texts[part])).logits, labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def write_trained(folder: Path) -> EncoderCheckpoint:
    """A BERT trained on PLAIN, LoRA experts trained on TASTE and SOUND under its frozen head, and a gate that has
    learned from the base's hidden states which task a token is of."""
    base = folder / "base"
    names = {"id2label": {0: "less", 1: "more"}, "label2id": {"less": 0, "more": 1}}
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **SIZES, **names, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = AutoModelForSequenceClassification.from_config(config)
    base.mkdir(parents=True)
    write_words(base)
    fit(model, base, PLAIN, steps=150, rate=3e-3)
    model.save_pretrained(base)
    experts = {}
    for name, task in (("taste", TASTE), ("sound", SOUND)):
        torch.manual_seed(1)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "intermediate.dense", "output.dense"])
        expert = get_peft_model(load_encoder_model(base), lora)
        fit(expert, base, task, steps=150, rate=1e-2)
        expert.save_pretrained(folder / name)
        experts[name] = folder / name
    return EncoderCheckpoint(base, experts, _trained_gate(folder / "xlora", base, experts))


def _trained_gate(folder: Path, base: Path, experts: Mapping[str, Path]) -> Path:
    """A depth-1 gate, trained on every token's hidden state."""
    texts, _ = task_batch([TASTE, SOUND], 256, seed=2)
    batch = encoded(base, texts)
    with torch.no_grad():
        hidden = load_encoder_model(base)(**batch, output_hidden_states=True).hidden_states[-1]
    real = batch["attention_mask"].bool()
    wanted = torch.tensor([0, 1]).repeat(128)[:, None].expand_as(real)[real]
    torch.manual_seed(3)
    layer = torch.nn.Linear(HIDDEN, len(experts))
    optimizer = torch.optim.Adam(layer.parameters(), 3e-2)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(layer(hidden[real]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = {"0.weight": layer.weight.detach(), "0.bias": layer.bias.detach()}
    return save_gate(folder, base, experts, tensors, layerwise_scalings=False)
