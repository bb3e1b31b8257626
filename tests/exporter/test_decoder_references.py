"""The oracle of verification is PEFT on every family: X-LoRA where its gate can be loaded, else LoRA after LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.reference import ReferenceResult
from exporter.spec import AdapterSource
from tests.exporter.checkpoint_makers import write_live_xlora, write_lora
from tests.exporter.peft_models import logits_of, peft_lora, xlora_model
from tests.exporter.tiny_builds import (
    DECODERS,
    difference,
    load,
    named_sources,
    prompt,
    reference_of,
    without_expert,
    write_lively_base,
    write_three_experts,
)

LOGITS = 1e-5  # |d| / (1 + |logit|)
MATTERS = 0.05
TOKENS = prompt(21)  # longer than the windows of 8

# What PEFT's X-LoRA can gate: no lm_head, no module that sees its tokens in two dimensions (OPT's fc1 and fc2).
Targets = Sequence[str]
GATED: Mapping[str, tuple[Targets, Targets]] = {
    "llama": (("q_proj", "down_proj"), ("embed_tokens", "k_proj")),
    "mistral": (("q_proj", "down_proj"), ("embed_tokens", "k_proj")),
    "qwen2": (("q_proj", "down_proj"), ("embed_tokens", "k_proj")),
    "qwen3": (("q_proj", "down_proj"), ("embed_tokens", "k_proj")),
    "gemma2": (("q_proj", "down_proj"), ("embed_tokens", "k_proj")),
    "phi3": (("qkv_proj", "down_proj"), ("embed_tokens", "o_proj")),
    "gpt2": (("c_attn", "c_proj"), ("wte", "c_fc")),
    "opt": (("q_proj", "project_in"), ("embed_tokens", "project_out", "out_proj")),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), ("embed_in", "dense")),
    "gemma3_text": (("q_proj", "down_proj"), ("embed_tokens", "k_proj")),
    "mixtral": (("q_proj", "o_proj"), ("embed_tokens", "k_proj")),
}


def turned(family: str) -> dict[str, Any]:
    return {"fan_in_fan_out": True} if family == "gpt2" else {}


def assert_equal(result: ReferenceResult, expected: torch.Tensor) -> None:
    assert float(((result.logits - expected).abs() / (1 + expected.abs())).max()) <= LOGITS


@pytest.mark.parametrize("family", DECODERS)
def test_gated_reference_is_peft(family: str, tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", family)
    paths = [
        write_lora(tmp_path / f"e{number}", base, targets, 2 + number, seed=number, **turned(family))
        for number, targets in enumerate(GATED[family])
    ]
    model = xlora_model(base, paths, layerwise_scalings=True, scaling_pass_value=0.3, xlora_depth=2)
    write_live_xlora(tmp_path / "xlora", model)
    parts = load(base, AdapterSource(tmp_path / "xlora"))
    reference = reference_of(parts)
    expected = logits_of(model, TOKENS)
    result = reference.gated(TOKENS)
    assert_equal(result, expected)
    assert result.gate is not None
    assert float(result.gate.std(0).max()) > 1e-2, "a gate that does not depend on the token proves little"
    assert difference(reference.constant([0.0, 0.0], TOKENS).logits, expected) > MATTERS
    for column in range(2):
        dropped = reference_of(parts, without_expert(parts.inputs.adapters, column))
        dropped.sites = reference.sites  # the gate's columns stay where they are
        assert difference(dropped.gated(TOKENS).logits, expected) > MATTERS, f"expert {column} is not missed"


@pytest.mark.parametrize("family", DECODERS)
def test_every_expert_alone_is_peft(family: str, tmp_path: Path) -> None:
    """All modules a LoRA can stand on: words, learned positions, projections, two-dimensional MLPs, the head."""
    base = write_lively_base(tmp_path / "base", family)
    paths = write_three_experts(tmp_path / "experts", base, family)
    reference = reference_of(load(base, *named_sources(paths)))
    plain = reference.constant([0.0] * 3, TOKENS).logits
    for column, path in enumerate(paths.values()):
        expected = logits_of(peft_lora(base, path), TOKENS)
        assert_equal(reference.constant([float(column == e) for e in range(3)], TOKENS), expected)
        assert difference(plain, expected) > MATTERS
