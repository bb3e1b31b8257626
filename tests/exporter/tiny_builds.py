"""Whole builds of tiny checkpoints: a base no parameter of which is trivial, experts on every kind of site, a gate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from exporter.adapters import AdapterSet, Expert
from exporter.build_bundle import build
from exporter.checkpoints import describe_base, read_adapters
from exporter.inputs import Inputs
from exporter.op_lint import inlined_and_typed, lint
from exporter.parts import Parts, load_parts, make_verification
from exporter.reference import Reference
from exporter.spec import AdapterSource, BuildSpec, CacheChoice
from exporter.verify import Extent, Scenario, report_from_measures, verify_forms
from runtime.backends import open_session
from runtime.bundle import Bundle
from runtime.manifest import Check, GraphInfo, TopkSoftmax, VerifyLevel, VerifyReport
from runtime.session import SessionSettings
from tests.exporter.checkpoint_makers import edit_tensors, write_base, write_lora

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# Attention, then MLP, where a family calls them otherwise; no LoRA may touch Mixtral's block experts.
TARGETS = {
    "phi3": (("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
    "gpt2": (("c_attn",), ("c_fc", "c_proj")),
    "opt": (("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2", "project_in", "project_out")),
    "gpt_neox": (("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")),
    "mixtral": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
}
ENDS = {"gpt2": ("wte", "wpe", "lm_head"), "gpt_neox": ("embed_in", "lm_head")}


def write_lively_base(folder: Path, family: str = "llama", *, seed: int = 0, **sizes: Any) -> Path:
    """A base whose norms are not one and whose biases are not zero, so that losing one shows."""
    write_base(folder, family, seed=seed, **sizes)
    generator = torch.Generator().manual_seed(seed)

    def enliven(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(tensors):
            if tensors[name].dim() == 1:
                tensors[name] = tensors[name] + 0.3 * torch.randn(tensors[name].shape, generator=generator)

    edit_tensors(folder / "model.safetensors", enliven)
    return folder


def write_three_experts(folder: Path, base: Path, family: str = "llama", *, ends: bool = True) -> dict[str, Path]:
    """Experts of ranks 2, 3, 4: attention; attention and MLP; MLP and (with `ends`) embedding and lm_head."""
    attention, mlp = TARGETS.get(family, (ATTENTION, MLP))
    targets = {
        "math": attention,
        "code": (attention[0], *mlp),
        "prose": (*mlp, *ENDS.get(family, ("embed_tokens", "lm_head"))) if ends else mlp,
    }
    turned = {"fan_in_fan_out": True} if family == "gpt2" else {}
    return {
        name: write_lora(folder / name, base, modules, 2 + index, alpha=6 + index, seed=20 + index, **turned)
        for index, (name, modules) in enumerate(targets.items())
    }


def write_gate(folder: Path, base: Path, experts: Mapping[str, Path], *, sites: int = 1, **config: Any) -> Path:
    """A gate in PEFT's layout written by hand, for PEFT itself refuses experts on lm_head; `sites` > 1: layerwise."""
    folder.mkdir(parents=True)
    hidden = head_width(base)
    settings: dict[str, Any] = {
        "peft_type": "XLORA", "peft_version": "0.21.2", "hidden_size": hidden, "xlora_depth": 1, "xlora_size": 16,
        "xlora_dropout_p": 0.2, "layerwise_scalings": sites > 1, "base_model_name_or_path": str(base),
        "adapters": {str(column): str(path) for column, path in enumerate(experts.values())},
    } | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    depth = settings["xlora_depth"]
    widths = [hidden, *[settings["xlora_size"]] * (depth - 1), len(experts) * sites]
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for index in range(depth):
        name = f"base_model.internal_xlora_classifier.layers.{3 * index}"
        tensors[f"{name}.weight"] = torch.randn(widths[index + 1], widths[index], generator=generator) * 0.5
        tensors[f"{name}.bias"] = torch.randn(widths[index + 1], generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def head_width(base: Path) -> int:
    """The width of the hidden states that a gate reads."""
    config = AutoConfig.from_pretrained(base)
    return int(getattr(config, "word_embed_proj_dim", config.hidden_size))


def count_sites(experts: Mapping[str, Path]) -> int:
    """How many modules the experts adapt together."""
    keys = [key for path in experts.values() for key in load_file(path / "adapter_model.safetensors")]
    return len({key.split(".lora_")[0] for key in keys if ".lora_" in key})


def named_sources(experts: Mapping[str, Path]) -> tuple[AdapterSource, ...]:
    """NAME=DIR of plain LoRA folders."""
    return tuple(AdapterSource(path, name) for name, path in experts.items())


# Windows (8) are shorter than what is tested, softcaps small enough to matter, and every gate rule has a family.
SIZES: dict[str, dict[str, Any]] = {"gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}}
GATES: dict[str, dict[str, Any]] = {
    "llama": {"xlora_depth": 2, "softmax_temperature": 0.8},
    "mistral": {"top_k_lora": 2},
    "qwen2": {"layerwise_scalings": False},
    "qwen3": {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True},
    "gemma2": {"global_scaling_weight": 1.5},
    "phi3": {"scaling_pass_value": 0.3},
}
FAMILIES = tuple(GATES)
# Families with something of their own: learned positions, fused projections, block experts, two ropes.
GATES |= {
    "gpt2": {"xlora_depth": 2, "scaling_pass_value": 0.3},
    "opt": {"top_k_lora": 2},
    "gpt_neox": {"layerwise_scalings": False},
    "gemma3_text": {"softmax_temperature": 1.5},
    "mixtral": {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True},
}
DECODERS = tuple(GATES)


def quick(adapters: tuple[AdapterSource, ...], base: Path) -> BuildSpec:
    """A build with few checks on one thread."""
    return BuildSpec(adapters, str(base), verify=VerifyLevel.QUICK, threads=1)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Folders of one tiny checkpoint."""

    base: Path
    xlora: Path

    def spec(self, **settings: Any) -> BuildSpec:
        """A quick build of it."""
        source = AdapterSource(self.xlora)
        return replace(quick((source,), self.base), **settings)

    def parts(self) -> Parts:
        """What a build loads of it, freshly."""
        return load(self.base, AdapterSource(self.xlora))


@dataclass(frozen=True, slots=True)
class Built:
    """A checkpoint and the bundle made of it."""

    checkpoint: Checkpoint
    bundle: Bundle


def write_checkpoint(folder: Path, family: str = "llama", **sizes: Any) -> Checkpoint:
    """Three experts on every kind of site of a family, and the gate of GATES."""
    base = write_lively_base(folder / "base", family, **SIZES.get(family, {}) | sizes)
    experts = write_three_experts(folder / "experts", base, family)
    gate = GATES[family]
    sites = count_sites(experts) if gate.get("layerwise_scalings", True) else 1
    return Checkpoint(base, write_gate(folder / "xlora", base, experts, sites=sites, **gate))


def build_family(folder: Path, family: str, **settings: Any) -> Built:
    """Write a checkpoint under `folder` and build it."""
    checkpoint = write_checkpoint(folder, family)
    return Built(checkpoint, build(checkpoint.spec(out=folder / "bundle", **settings)))


def load(base: Path, *sources: AdapterSource, gate: Path | None = None, topk: TopkSoftmax | None = None) -> Parts:
    """What a build loads of these folders."""
    cache = CacheChoice.NONE if topk is TopkSoftmax.FLATTENED else CacheChoice.KV
    adapters = read_adapters(sources, gate, topk_softmax=topk, cache=cache)
    return load_parts(Inputs(adapters, describe_base(str(base)), ()))


def reference_of(parts: Parts, adapters: AdapterSet | None = None) -> Reference:
    """The oracle of these parts."""
    return Reference(parts.model, adapters or parts.inputs.adapters, parts.kinds)


def without_expert(adapters: AdapterSet, column: int) -> AdapterSet:
    """The set with one expert emptied; its column stays."""
    experts = [
        Expert(expert.name, {} if e == column else expert.deltas, expert.key, expert.folder)
        for e, expert in enumerate(adapters.experts)
    ]
    return AdapterSet(tuple(experts), adapters.gate)


def measured(
    parts: Parts, graph: GraphInfo, folder: Path, *, new_tokens: int = 6, scenarios: Sequence[Scenario] = ()
) -> VerifyReport:
    """Stage A of one graph in `folder`, over few and short prompts, as a report; nothing is raised."""
    verification = make_verification(parts, BuildSpec(verify=VerifyLevel.QUICK), None)
    settings = SessionSettings(verification.max_positions, threads=1)
    session = open_session("ort", folder / graph.path, graph.signature, settings)
    try:
        prompts = [prompt(length, seed=length) for length in (3, 21, 14, 9)]
        chosen = scenarios or verification.scenarios(graph)[:1]
        [measures] = verify_forms([session], chosen, prompts, Extent(len(prompts), 21, new_tokens))
        return report_from_measures(measures, graph.name, VerifyLevel.QUICK, "A", "not needed (fp32)")
    finally:
        session.close()


def measured_precisely(parts: Parts, graph: GraphInfo, folder: Path) -> VerifyReport:
    """The same against the reference with fp64 products: what is left is the graph's own noise, not torch's besides."""
    verification = make_verification(parts, BuildSpec(verify=VerifyLevel.QUICK), None)
    [scenario, *_] = verification.scenarios(graph)
    assert scenario.precise is not None
    return measured(parts, graph, folder, scenarios=[replace(scenario, reference=scenario.precise)])


def failed(report: VerifyReport) -> dict[str, Check]:
    """The checks that failed, by name."""
    return {check.name: check for check in report.checks if not check.passed}


def assert_wide_margin(checks: Sequence[Check]) -> None:
    """A right export uses at most half of every limit; limits are taken from the model's own noise, so bugs show."""
    for check in checks:
        assert check.value * 2 <= check.limit, shown(checks)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Seeded token ids."""
    return torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def difference(a: Any, b: Any) -> float:
    """The largest absolute difference."""
    return float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())


def shown(checks: Sequence[Any]) -> str:
    """Checks as one readable line, for assertion messages."""
    return "; ".join(f"{check.name} {check.value:.3g}/{check.limit:g} {check.where}" for check in checks)


def assert_lints(model: ir.Model) -> None:
    """No finding, and none for want of a type."""
    assert lint(model) == ()
    values = [value for node in inlined_and_typed(model).graph.all_nodes() for value in node.outputs]
    assert [value.name for value in values if value.dtype is None or value.shape is None] == []


def assert_named_dimensions(bundle: Bundle) -> None:
    """Every graph's inputs have the signature's own symbols: engines find C by its name."""
    for info in bundle.manifest.graphs:
        found = {value.name: value.shape for value in ir.load(bundle.file(info.path)).graph.inputs}
        for spec in info.signature.inputs:
            shape = found[spec.name]
            assert shape is not None
            assert tuple(size if isinstance(size, int) else size.value for size in shape) == spec.shape, spec.name
