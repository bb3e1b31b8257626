"""One weight or two: config.json, transformers' loader and PEFT may each say otherwise; bundles follow PEFT itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from exporter.build_bundle import build
from exporter.checkpoints import describe_base
from exporter.inputs import read_inputs
from exporter.parts import load_parts
from runtime.manifest import Mode, VerifyLevel
from tests.exporter.checkpoint_makers import edit_json, edit_tensors, write_adapter
from tests.exporter.peft_models import logits_of, peft_lora
from tests.exporter.test_adapter_kinds import TOKENS, assert_is_peft, spec_of
from tests.exporter.test_adapter_kinds import logits_of as bundle_logits
from tests.exporter.tiny_builds import difference, reference_of, write_lively_base

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = [TOKENS[0], 5, TOKENS[3]]
SIZES: dict[str, Any] = {"num_hidden_layers": 1}


def two_equal(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBED].clone()


def head_only(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBED)


# What config.json says, what the file holds -> (base says tied by config, once loaded, to PEFT)
Ties = tuple[bool, bool, bool]
BASES: dict[str, tuple[bool, bool, Callable[[dict[str, torch.Tensor]], None] | None, Ties]] = {
    "apart": (False, False, None, (False, False, False)),
    "tied": (True, True, None, (True, True, True)),
    "tied, head stored": (True, True, head_only, (True, True, True)),
    "tied, two equal": (True, True, two_equal, (True, True, True)),
    "tied, two that differ": (False, True, None, (True, False, True)),
    "apart, two equal": (True, False, two_equal, (False, False, False)),
}

# The adapter -> LoraConfig's settings.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora head": {"target_modules": ["q_proj", "lm_head"]},
    "lora both": {"target_modules": ["embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": ROWS},
    "rows of embedding": {"trainable_token_indices": {"embed_tokens": ROWS}},
    "rows of head": {"trainable_token_indices": {"lm_head": ROWS}},
    "rows of both": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}},
    "other rows of both": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [1, 7]}},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved both": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def write_tied(folder: Path, kind: str, family: str = "qwen2", **sizes: Any) -> Path:
    """A tiny base of one of the kinds of tying."""
    made_tied, says_tied, change, _ = BASES[kind]
    base = write_lively_base(folder, family, tie_word_embeddings=made_tied, **SIZES | sizes)
    if change is not None:
        edit_tensors(base / "model.safetensors", change)
    edit_json(base / "config.json", tie_word_embeddings=says_tied)
    return base


def write_ends(folder: Path, base: Path, adapter: str, **more: Any) -> Path:
    settings = {"target_modules": ["q_proj"]} | ADAPTERS[adapter] | more
    return write_adapter(folder, base, LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **settings), seed=6)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> its base, written on first use."""
    root, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_tied(root / f"base{len(made)}", kind)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", BASES)
def test_who_says_that_both_are_one(kind: str, bases: Callable[[str], Path]) -> None:
    base = describe_base(str(bases(kind)))
    assert base.tying is not None
    assert (base.tying.embedding, base.tying.head) == (EMBED, HEAD)
    assert (base.tying.by_config, base.tying.by_loader, base.tying.by_peft) == BASES[kind][3]
    assert any("the files hold two that differ" in note for note in base.notes) == (kind == "tied, two that differ")


@pytest.mark.parametrize("kind", BASES)
def test_the_oracle_is_peft_however_ends_are_tied(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """All adapters; what the adapter changes at the ends matters to PEFT's logits."""
    base = bases(kind)
    for number, adapter in enumerate(ADAPTERS):
        path = write_ends(tmp_path / str(number), base, adapter)
        expected = logits_of(peft_lora(base, path), TOKENS)
        inputs = read_inputs(spec_of(base, {"one": path}, Mode.STATIC, {"one": 1.0}))
        parts = load_parts(inputs)
        found = reference_of(parts).constant([1.0], TOKENS).logits
        assert difference(found, expected) < 2e-5, (kind, adapter)
        [expert] = inputs.adapters.experts
        deltas = {name: delta for name, delta in expert.deltas.items() if "q_proj" in name}
        plain = replace(inputs.adapters, experts=(replace(expert, replacements={}, deltas=deltas),))
        assert difference(reference_of(parts, plain).constant([1.0], TOKENS).logits, expected) > 1e-2, (kind, adapter)


# One build of each adapter and two of each base's kind in CI.
DIAGONAL = (
    ("apart", "rows"), ("apart", "lora both"), ("tied", "rows of head"), ("tied", "other rows of both"),
    ("tied", "rows of both"), ("tied, head stored", "rows of embedding"), ("tied, head stored", "lora head"),
    ("tied, two equal", "rows"), ("tied, two equal", "saved head"), ("tied, two that differ", "rows"),
    ("tied, two that differ", "lora embedding"), ("tied, two that differ", "saved both"),
    ("apart, two equal", "saved embedding"),
)  # fmt: skip
REST = [pair for pair in ((kind, name) for kind in BASES for name in ADAPTERS) if pair not in DIAGONAL]


@pytest.mark.parametrize(
    ("kind", "adapter"), [*DIAGONAL, *(pytest.param(*pair, marks=pytest.mark.long) for pair in REST)]
)
def test_static_bundles_are_peft_however_ends_are_tied(
    kind: str, adapter: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(kind)
    path = write_ends(tmp_path / "one", base, adapter)
    expected = logits_of(peft_lora(base, path), TOKENS)
    spec = spec_of(base, {"one": path}, Mode.STATIC, {"one": 1.0})
    bundle = build(replace(spec, out=tmp_path / "full"))
    assert_is_peft(bundle_logits(bundle, "static", None), expected)
    trusted = build(replace(spec, verify=VerifyLevel.STRUCTURE, out=tmp_path / "structure"))
    assert_is_peft(bundle_logits(trusted, "static", None), expected)
