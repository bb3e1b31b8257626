"""Tiny random bases, LoRA folders and X-LoRA folders of both layouts, written as real tools write them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What a family needs beyond SIZES, or names differently.
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8, "head_dim": 8},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {"original_max_position_embeddings": 128},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48},
    # As opt-350m: norms after the blocks' parts, words narrower than the blocks, projected in and out.
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    "gpt_neox": {},
    "gemma3_text": {
        "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
        },
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
}  # fmt: skip
NORMAL_PREFIX = "base_model.model."


def write_base(folder: Path, family: str = "llama", *, seed: int = 0, dtype: str = "float32", **sizes: Any) -> Path:
    """A random causal language model of this model_type, saved as safetensors; returns the folder."""
    names = SIZES if family != "gpt2" else {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **(names | FAMILY_SIZES.get(family, {}) | sizes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    # Default initialisation is so small that a tiny model hardly uses its attention.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def load_model(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The base through transformers, ready for PEFT's X-LoRA."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    model.config.use_cache = False
    return model


def write_lora(
    folder: Path, base: Path, targets: Sequence[str] | str = ("q_proj", "v_proj"), rank: int = 4, *,
    alpha: float = 8, seed: int = 0, scale: float = 0.3, **config: Any,
) -> Path:  # fmt: skip
    """A LoRA with random A and B, written by PEFT itself; `config` goes to LoraConfig."""
    from peft import LoraConfig, get_peft_model

    # "lm_head" alone has no dot before it, so PEFT's list and its key are one.
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM", **config,
    )  # fmt: skip
    model = get_peft_model(load_model(base), lora)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale / math.sqrt(rank)
    model.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, config: Any, *, seed: int = 0) -> Path:
    """An adapter of any PEFT config, written by PEFT, with every trained tensor far from where it began."""
    from peft import get_peft_model

    model = get_peft_model(load_model(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude_vector" in name:
            parameter.data *= 1 + 0.3 * noise
        elif "lora_" in name:
            parameter.data = 0.3 * noise
        elif ".modules_to_save." in name or "trainable_tokens_delta" in name:
            parameter.data += 0.3 * noise
    model.save_pretrained(folder)
    return folder


def write_dora(folder: Path, base: Path, targets: Sequence[str], *, seed: int = 0, **config: Any) -> Path:
    """A DoRA of rank 3."""
    from peft import LoraConfig

    settings = {"r": 3, "lora_alpha": 5} | config
    lora = LoraConfig(target_modules=list(targets), use_dora=True, task_type="CAUSAL_LM", **settings)
    return write_adapter(folder, base, lora, seed=seed)


def write_adalora(
    folder: Path, base: Path, targets: Sequence[str], *, kept: Mapping[str, Sequence[bool]] | None = None,
    seed: int = 0, **config: Any,
) -> Path:  # fmt: skip
    """An AdaLoRA that began with 4 ranks; `kept` tells by module path which are left."""
    from peft import AdaLoraConfig

    pattern = {f"{path}.lora_E": list(ranks) for path, ranks in (kept or {}).items()} or None
    settings = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10} | config
    ada = AdaLoraConfig(target_modules=list(targets), task_type="CAUSAL_LM", rank_pattern=pattern, **settings)
    return write_adapter(folder, base, ada, seed=seed)


def write_experts(
    folder: Path, base: Path, count: int = 3, targets: Sequence[str] = ("q_proj", "v_proj")
) -> list[Path]:
    """`count` LoRA folders `skill0`, `skill1`, .. of ranks 2, 3, 4, 2, .."""
    ranks = (2, 3, 4)
    return [
        write_lora(folder / f"skill{index}", base, targets, ranks[index % 3], alpha=4 + index, seed=10 + index)
        for index in range(count)
    ]


def make_xlora(base: Path, experts: Sequence[Path] | Mapping[str, Path], *, seed: int = 0, **config: Any) -> Any:
    """A live PEFT X-LoRA model with a random gate; experts are named "0", "1", .. as PEFT needs."""
    from peft import XLoraConfig, get_peft_model

    model = load_model(base)
    adapters = experts if isinstance(experts, Mapping) else {str(key): path for key, path in enumerate(experts)}
    settings = {"hidden_size": model.get_output_embeddings().in_features, "xlora_size": 16} | config
    xlora = XLoraConfig(task_type="CAUSAL_LM", adapters={key: str(path) for key, path in adapters.items()}, **settings)
    torch.manual_seed(seed)
    result = get_peft_model(model, xlora)
    with torch.no_grad():
        for parameter in result.base_model.internal_xlora_classifier.parameters():
            parameter.normal_(0, 1.0)
    return result


def classifier_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The live gate's tensors under the keys a complete PEFT save has."""
    state = model.base_model.internal_xlora_classifier.state_dict()
    return {f"base_model.internal_xlora_classifier.{key}": value.clone() for key, value in state.items()}


def write_xlora_peft(folder: Path, base: Path, experts: Sequence[Path] | Mapping[str, Path], **config: Any) -> Path:
    """A complete X-LoRA folder in PEFT's layout, as PEFT 0.19 writes it: all gate layers, no sub-folders."""
    model = make_xlora(base, experts, **config)
    write_live_xlora(folder, model)
    return folder


def write_live_xlora(folder: Path, model: Any) -> None:
    """Save a live X-LoRA with the gate layers written back, and without the useless numbered sub-folders."""
    model.save_pretrained(folder)
    save_file(classifier_tensors(model), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for sub_folder in (path for path in folder.iterdir() if path.is_dir()):
        shutil.rmtree(sub_folder)


def write_xlora_peft_damaged(
    folder: Path, base: Path, experts: Sequence[Path] | Mapping[str, Path], **config: Any
) -> dict[str, torch.Tensor]:
    """An X-LoRA folder exactly as PEFT 0.21.2 saves it, gate layers lost; returns what a complete save would hold."""
    model = make_xlora(base, experts, **config)
    model.save_pretrained(folder)
    return classifier_tensors(model)


def write_xlora_original(
    folder: Path, base: Path, experts: Sequence[Path] | Mapping[str, Path], *, as_list: bool = False,
    n_sites: int | None = None, seed: int = 0, **config: Any,
) -> Path:  # fmt: skip
    """An X-LoRA folder in the layout of the original library: experts inside it under their names."""
    folder.mkdir(parents=True)
    named = experts if isinstance(experts, Mapping) else {f"adapter_{i + 1}": path for i, path in enumerate(experts)}
    for name, path in named.items():
        shutil.copytree(path, folder / name)
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    settings: dict[str, Any] = {
        "hidden_size": hidden, "device": "cpu", "enable_softmax": True, "enable_softmax_topk": False,
        "layerwise_scalings": n_sites is not None, "xlora_depth": 1, "xlora_size": 16, "enable_relu_and_dropout": True,
        "use_bias": True, "xlora_dropout_p": 0.2, "use_trainable_adapters": False, "softmax_temperature": 1.0,
        "top_k_lora": None, "scaling_pass_value": 0.0, "global_scaling_weight": 1.0, "base_model_id": str(base),
        "adapters": list(named) if as_list else {name: f"./{name}" for name in named},
    } | config  # fmt: skip
    (folder / "xlora_config.json").write_text(json.dumps(settings))
    save_file(_original_classifier(settings, len(named), n_sites, seed), folder / "xlora_classifier.safetensors")
    return folder


def _original_classifier(settings: dict[str, Any], n: int, n_sites: int | None, seed: int) -> dict[str, torch.Tensor]:
    """inner.0, inner.3, .. (Linear, ReLU, Dropout) or inner.0, inner.1, .., then last."""
    step = 3 if settings["enable_relu_and_dropout"] else 1
    depth, size = settings["xlora_depth"], settings["xlora_size"]
    names = [*(f"inner.{step * index}" for index in range(depth - 1)), "last"]
    widths = [settings["hidden_size"], *[size] * (depth - 1), n * (n_sites or 1)]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, name in enumerate(names):
        tensors[f"{name}.weight"] = torch.randn(widths[index + 1], widths[index], generator=generator)
        if settings["use_bias"]:
            tensors[f"{name}.bias"] = torch.randn(widths[index + 1], generator=generator)
    return tensors


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; a value of `...` removes the field."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(path: Path, change: Any) -> None:
    """Load a safetensors file, let `change(tensors)` edit the dict in place, save it."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
