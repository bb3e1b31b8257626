"""The oracle of verification is PEFT 0.21.2, setting by setting; each case goes red when one expert is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.parts import Parts
from exporter.reference import ReferenceResult
from exporter.spec import AdapterSource
from runtime.manifest import TopkSoftmax
from tests.exporter.checkpoint_makers import load_model, make_xlora, write_live_xlora, write_lora
from tests.exporter.tiny_builds import (
    ATTENTION,
    MLP,
    difference,
    load,
    named_sources,
    prompt,
    reference_of,
    without_expert,
    write_lively_base,
)

LOGITS = 1e-5  # |d| / (1 + |logit|); measured noise is below 2e-6
GATE = 5e-6  # |d| / (1 + |scaling|); measured noise is below 1.4e-6
MATTERS = 0.05  # what adapters and each expert must change at least
TOKENS = prompt(13)

Experts = Mapping[str, Mapping[str, Any]]

SAME_TARGETS: Experts = {
    "one": {"targets": ("q_proj", "v_proj"), "rank": 4},
    "two": {"targets": ("q_proj", "v_proj"), "rank": 4},
    "three": {"targets": ("q_proj", "v_proj"), "rank": 4},
}
# PEFT before 0.16 ended in a KeyError here: an expert on q,v beside one on q,k,v.
QV_BESIDE_QKV: Experts = {
    "two_modules": {"targets": ("q_proj", "v_proj"), "rank": 4},
    "three_modules": {"targets": ("q_proj", "k_proj", "v_proj"), "rank": 4},
}
ALL_KINDS: Experts = {
    "attention": {"targets": ATTENTION, "rank": 2, "alpha": 4},
    "mlp": {"targets": MLP, "rank": 5, "alpha": 10},
    "one_block": {"targets": r"model\.layers\.1\.self_attn\.v_proj", "rank": 3, "alpha": 9},
}
PATTERNS: Experts = {
    "rs": {"targets": ("q_proj", "o_proj"), "rank": 4, "alpha": 4, "use_rslora": True},
    "rank": {"targets": ("q_proj", "v_proj"), "rank": 4, "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    "alpha": {"targets": ("v_proj", "down_proj"), "rank": 2, "alpha_pattern": {"layers.1.mlp.down_proj": 1}},
}
EMBEDDING: Experts = {
    "words": {"targets": ("embed_tokens", "q_proj"), "rank": 3},
    "rest": {"targets": ("q_proj", "v_proj"), "rank": 4},
}

CASES: dict[str, tuple[Experts, Mapping[str, Any]]] = {
    "layerwise": (SAME_TARGETS, {"layerwise_scalings": True}),
    "shared": (SAME_TARGETS, {"layerwise_scalings": False}),
    "depth 2": (SAME_TARGETS, {"layerwise_scalings": True, "xlora_depth": 2}),
    "depth 3 without dropout": (SAME_TARGETS, {"xlora_depth": 3, "xlora_dropout_p": 0.0, "layerwise_scalings": True}),
    "temperature": (SAME_TARGETS, {"layerwise_scalings": True, "softmax_temperature": 0.3}),
    "top-k": (SAME_TARGETS, {"layerwise_scalings": True, "top_k_lora": 2}),
    "top-k softmax over softmax": (
        SAME_TARGETS, {"layerwise_scalings": True, "top_k_lora": 2, "enable_softmax_topk": True}
    ),
    "top-k softmax alone": (
        SAME_TARGETS,
        {"layerwise_scalings": True, "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    ),
    "no softmax": (SAME_TARGETS, {"layerwise_scalings": True, "enable_softmax": False}),
    "scaling pass 0.3": (SAME_TARGETS, {"layerwise_scalings": True, "scaling_pass_value": 0.3}),
    "scaling pass 0.3 after top-k softmax": (
        SAME_TARGETS,
        {"layerwise_scalings": True, "scaling_pass_value": 0.3, "top_k_lora": 2, "enable_softmax_topk": True},
    ),
    "scaling pass 1/n": (SAME_TARGETS, {"layerwise_scalings": True, "scaling_pass_value": None}),
    "global weight": (
        SAME_TARGETS, {"layerwise_scalings": True, "global_scaling_weight": 0.4, "scaling_pass_value": 0.5}
    ),
    "q,v beside q,k,v": (QV_BESIDE_QKV, {"layerwise_scalings": True}),
    "ranks, targets, a module of one expert": (ALL_KINDS, {"layerwise_scalings": True}),
    "rsLoRA and patterns": (PATTERNS, {"layerwise_scalings": True}),
    "embedding": (EMBEDDING, {"layerwise_scalings": True, "scaling_pass_value": 0.3}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively_base(tmp_path_factory.mktemp("reference") / "base")


def write_all(folder: Path, base: Path, experts: Experts) -> dict[str, Path]:
    """The experts' LoRA folders by name; those that are there already are kept."""
    return {
        name: folder / name if (folder / name).exists() else write_lora(folder / name, base, seed=index, **settings)
        for index, (name, settings) in enumerate(experts.items())
    }


def peft_xlora(folder: Path, base: Path, experts: Experts, **config: Any) -> tuple[Any, Parts]:
    """PEFT's live X-LoRA, and what we read of its checkpoint."""
    paths = list(write_all(base.parent / "-".join(experts), base, experts).values())
    value = config.get("scaling_pass_value", 0.0)
    model = make_xlora(base, paths, **config | {"scaling_pass_value": value})
    model.base_model.set_scaling_pass_value(value)
    write_live_xlora(folder / "xlora", model)
    return model.eval(), load(base, AdapterSource(folder / "xlora"))


@torch.no_grad()
def peft_logits(model: Any, tokens: Sequence[int] = TOKENS) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def peft_gate(model: Any) -> torch.Tensor:
    """The last scalings [T, n_layers, n], after the rules of PEFT's own layers."""
    raw = model.base_model.get_latest_scalings()
    layers = [module.forward.__self__ for module in model.modules() if "lora_A" in dict(module.named_children())]
    ruled = [layer.get_maybe_topk_scalings(raw) for layer in sorted(layers, key=lambda layer: layer.layer_number)]
    return torch.stack(ruled, dim=2)[0]


def assert_equal_to_peft(result: ReferenceResult, logits: torch.Tensor) -> None:
    assert float(((result.logits - logits).abs() / (1 + logits.abs())).max()) <= LOGITS


def assert_every_expert_counts(parts: Parts, logits: torch.Tensor) -> None:
    for column, expert in enumerate(parts.inputs.adapters.experts):
        dropped = reference_of(parts, without_expert(parts.inputs.adapters, column))
        dropped.sites = reference_of(parts).sites  # the gate's columns stay where they are
        assert difference(dropped.gated(TOKENS).logits, logits) > MATTERS, f"{expert.name} is not missed"


@pytest.mark.parametrize("case", CASES)
def test_gated_reference_is_peft(case: str, base: Path, tmp_path: Path) -> None:
    experts, config = CASES[case]
    model, parts = peft_xlora(tmp_path, base, experts, **config)
    expected = peft_logits(model)
    result = reference_of(parts).gated(TOKENS)
    assert_equal_to_peft(result, expected)
    assert result.gate is not None
    sites = peft_gate(model)
    assert float(((result.gate - sites).abs() / (1 + sites.abs())).max()) <= GATE
    assert float(sites.std(0).max()) > 1e-2, "a gate that does not depend on the token proves little"
    plain = reference_of(parts).constant([0.0] * len(experts), TOKENS).logits
    assert difference(plain, expected) > MATTERS
    assert_every_expert_counts(parts, expected)


def test_base_alone_is_transformers(base: Path) -> None:
    paths = write_all(base.parent / "-".join(SAME_TARGETS), base, SAME_TARGETS)
    parts = load(base, *named_sources(paths))
    assert difference(reference_of(parts).constant([0.0] * 3, TOKENS).logits, peft_logits(load_model(base))) <= LOGITS


def old_rule(layer: Any, scalings: torch.Tensor) -> torch.Tensor:
    """XLoraLayer.get_maybe_topk_scalings as PEFT 0.17.1 had it: one softmax over all tokens' kept values together."""
    xlora_scalings = scalings[:, :, layer.layer_number, :]
    if layer.config.top_k_lora is not None:
        _, topk_indices = torch.topk(xlora_scalings, k=layer.config.top_k_lora, dim=-1)
        mask = torch.zeros_like(xlora_scalings, dtype=torch.bool)
        mask.scatter_(-1, topk_indices, True)
        xlora_scalings = xlora_scalings * mask.to(xlora_scalings.dtype)
    if layer.config.enable_softmax_topk:
        nonzero_mask = xlora_scalings != 0
        softmax_res_nonzero = torch.softmax(xlora_scalings[nonzero_mask], dim=-1)
        xlora_scalings[nonzero_mask] = softmax_res_nonzero
    return xlora_scalings


@pytest.mark.parametrize("scaling_pass_value", [0.0, 0.3])
def test_flattened_rule_is_peft_before_0_18(
    scaling_pass_value: float, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.xlora.layer import XLoraLayer

    config = {
        "layerwise_scalings": True, "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True,
        "scaling_pass_value": scaling_pass_value,
    }  # fmt: skip
    model, _ = peft_xlora(tmp_path, base, SAME_TARGETS, **config)
    tokenwise = peft_logits(model)
    monkeypatch.setattr(XLoraLayer, "get_maybe_topk_scalings", old_rule)
    expected = peft_logits(model)
    assert difference(expected, tokenwise) > MATTERS, "the two rules must differ for this test to mean anything"
    parts = load(base, AdapterSource(tmp_path / "xlora"), topk=TopkSoftmax.FLATTENED)
    result = reference_of(parts).gated(TOKENS)
    assert_equal_to_peft(result, expected)
    assert result.gate is not None
    assert difference(result.gate.sum(dim=(0, 2)), 1.0) <= 1e-5, "one softmax a site over the whole sequence"
    assert_every_expert_counts(parts, expected)


# PEFT's X-LoRA refuses these; plain PEFT LoRA is their oracle, one expert or a weighted sum at a time.
UNGATED: dict[str, tuple[str, Experts]] = {
    "lm_head": (
        "llama",
        {
            "head": {"targets": ("lm_head", "q_proj"), "rank": 3},
            "ends": {"targets": ("embed_tokens", "lm_head"), "rank": 2, "alpha": 6},
        },
    ),
    "gpt2 Conv1D": (
        "gpt2",
        {
            "attention": {"targets": ("c_attn",), "rank": 3, "fan_in_fan_out": True},
            "both": {"targets": ("c_attn", "c_fc"), "rank": 2, "fan_in_fan_out": True},
        },
    ),
    "gemma2 scaled embedding": (
        "gemma2",
        {
            "words": {"targets": ("embed_tokens",), "rank": 3},
            "rest": {"targets": ("q_proj", "down_proj"), "rank": 2},
        },
    ),
}


@pytest.mark.parametrize("case", UNGATED)
def test_constant_scalings_are_peft_lora(case: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    family, experts = UNGATED[case]
    base = write_lively_base(tmp_path / "base", family)
    paths = write_all(tmp_path / "experts", base, experts)
    reference = reference_of(load(base, *named_sources(paths)))
    plain = reference.constant([0.0, 0.0], TOKENS).logits
    first, second = experts
    model = PeftModel.from_pretrained(load_model(base), str(paths[first]), adapter_name=first)
    model.load_adapter(str(paths[second]), adapter_name=second)
    for active, row in (([first], [1.0, 0.0]), ([second], [0.0, 1.0]), ([first, second], [1.0, 1.0])):
        model.base_model.set_adapter(active)
        expected = peft_logits(model.eval())
        assert_equal_to_peft(reference.constant(row, TOKENS), expected)
        assert difference(plain, expected) > MATTERS
    for name, weight in ((first, 0.7), (second, -0.3)):
        for module in model.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.set_scale(name, weight)
    expected = peft_logits(model)
    assert_equal_to_peft(reference.constant([0.7, -0.3], TOKENS), expected)
    for row in ([0.7, 0.0], [0.0, -0.3]):
        assert difference(reference.constant(row, TOKENS).logits, expected) > MATTERS / 5, "an expert is not missed"
