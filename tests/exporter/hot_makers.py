"""Bundles whose adapters are inputs, adapter folders of many kinds for them, and an oracle that knows no bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from exporter.build_bundle import build
from exporter.checkpoints import read_adapters
from exporter.parts import Parts
from exporter.reference import Reference
from exporter.spec import CacheChoice, HotSpec
from runtime.bundle import Bundle
from runtime.manifest import MixInfo, VerifyLevel
from tests.exporter.checkpoint_makers import write_adalora, write_lora
from tests.exporter.tiny_builds import ATTENTION, MLP, load, named_sources, quick, write_lively_base
from tests.same_tokens import TIE_MARGIN

Mix = tuple[tuple[str, float], ...]  # folder name, weight
PROMPTS = ((1, 5, 9, 22, 3), (7, 7, 40, 11, 2, 60, 33, 8), (12,))
NEW = 6
Q, V, UP = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))


def write_folders(folder: Path, base: Path) -> dict[str, Path]:
    """Adapters that touch different modules, of every kind that a running bundle takes."""
    ends = write_lora(folder / "ends", base, ("embed_tokens", "lm_head", "o_proj"), 2, alpha=5, seed=5)
    without_base_weights(ends)
    return {
        "math": write_lora(folder / "math", base, ATTENTION, 2, alpha=6, seed=1),
        "code": write_lora(folder / "code", base, (ATTENTION[0], *MLP), 3, alpha=5, seed=2, use_rslora=True),
        "wide": write_lora(
            folder / "wide", base, (*ATTENTION, *MLP), 4, alpha=7, seed=3,
            rank_pattern={"q_proj": 1, "layers.0.mlp.up_proj": 2}, alpha_pattern={"v_proj": 3},
        ),
        "ada": write_adalora(
            folder / "ada", base, ("q_proj", "up_proj"), seed=4,
            kept={Q: (True, False, True, True), UP: (False, True, False, False)},
        ),
        "ends": ends,
        "small": write_lora(folder / "small", base, ("v_proj",), 1, alpha=4, seed=6, scale=0.8),
    }  # fmt: skip


def without_base_weights(folder: Path) -> None:
    """PEFT saves the embeddings beside a LoRA on them, which only a build can compare with the base."""
    path = folder / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if "lora_" in key}
    save_file(tensors, path)


@dataclass
class Oracle:
    """Greedy tokens and logits of a mix of folders, computed expert by expert in torch; each once."""

    base: Path
    folders: Mapping[str, Path]
    found: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    parts: Parts | None = None

    def reference(self) -> Reference:
        if self.parts is None:
            self.parts = load(self.base, *named_sources(self.folders))
        return Reference(self.parts.model, self.parts.inputs.adapters, self.parts.kinds)

    def logits(self, mix: Mix, tokens: tuple[int, ...]) -> torch.Tensor:
        """[T, V]."""
        weights = dict(mix)
        return self.reference().constant([weights.get(name, 0.0) for name in self.folders], tokens).logits

    def tokens(self, mix: Mix, prompt: tuple[int, ...], count: int = NEW) -> tuple[int, ...]:
        """The greedy continuation, up to the end token."""
        if (mix, prompt) not in self.found:
            self.found[mix, prompt] = greedy(lambda tokens: self.logits(mix, tokens), prompt, count)
        return self.found[mix, prompt]

    def tokens_by_site(self, mix: MixInfo, prompt: tuple[int, ...], count: int = NEW) -> tuple[int, ...]:
        """The same under weights that a module may have of its own."""
        reference = self.reference()
        weights = [mix.sites.get(path, mix.weights) for path, _ in reference.sites]
        rows = [[its.get(name, 0.0) for name in self.folders] for its in weights]
        return greedy(lambda tokens: reference.constant(rows, tokens).logits, prompt, count)


def greedy(
    logits: Callable[[tuple[int, ...]], torch.Tensor], prompt: tuple[int, ...], count: int = NEW
) -> tuple[int, ...]:
    """New tokens, up to the end token; a tie in them would make every comparison moot."""
    tokens = prompt
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != 2):
        top = logits(tokens)[-1].topk(2)
        assert float(top.values[0] - top.values[1]) > TIE_MARGIN
        tokens = (*tokens, int(top.indices[0]))
    return tokens[len(prompt) :]


@dataclass(frozen=True)
class HotWorld:
    """A base, adapter folders, the oracle, and a bundle that starts with two of them."""

    base: Path
    folders: Mapping[str, Path]
    oracle: Oracle
    bundle: Bundle


HOT = HotSpec(max_total_rank=12, max_experts=4, targets=("all-linear", "embed_tokens", "lm_head"))
FIRST = ("math", "code")


def make_world(folder: Path) -> HotWorld:
    """One quick build."""
    base = write_lively_base(folder / "base", num_hidden_layers=1)  # exports are the dear part
    folders = write_folders(folder / "adapters", base)
    first = named_sources({name: folders[name] for name in FIRST})
    spec = replace(quick(first, base), hot=HOT, out=folder / "bundle")
    return HotWorld(base, folders, Oracle(base, folders), build(spec))


def build_hot(out: Path, base: Path, first: Mapping[str, Path], hot: HotSpec, **settings: Any) -> Bundle:
    """A bundle without numeric checks, for tests that do their own."""
    settings = {"verify": VerifyLevel.STRUCTURE} | settings
    return build(replace(quick(named_sources(first), base), hot=hot, out=out, **settings))


def adapters_of(folders: Mapping[str, Path]) -> Any:
    """What a build reads of them."""
    return read_adapters(named_sources(folders), None, topk_softmax=None, cache=CacheChoice.KV)
