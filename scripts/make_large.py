"""Write an X-LoRA checkpoint of any size with random weights, shard by shard: for memory and speed measurements.

python scripts/make_large.py DIR --hidden 2048 --blocks 16 --intermediate 8192
python scripts/make_large.py DIR --like mistral-7b     # 14.5 GB of bfloat16 shards and 0.9 GB of experts
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig}
# Settings of a whole shape; what the command line says besides comes first.
LIKE = {
    "mistral-7b": {
        "family": "mistral", "hidden": 4096, "blocks": 32, "intermediate": 14336, "heads": 32, "kv_heads": 8,
        "vocab": 32000, "positions": 32768, "experts": 9, "rank": 16, "dtype": "bfloat16",
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    },
}  # fmt: skip


def main() -> None:
    """Base, experts and gate under one folder: base/, experts/eN/, xlora/."""
    args = arguments()
    config = CONFIGS[args.family](
        hidden_size=args.hidden,
        num_hidden_layers=args.blocks,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_position_embeddings=args.positions,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        architectures=[f"{args.family.capitalize()}ForCausalLM"],
        dtype=args.dtype,
        **({"sliding_window": None} if args.family == "mistral" else {}),
    )
    generator = torch.Generator().manual_seed(args.seed)
    write_base(args.folder / "base", config, DTYPES[args.dtype], generator)
    shapes = {target: shape for target, shape in module_shapes(config).items() if target in args.targets}
    for e in range(args.experts):
        write_expert(args.folder / "experts" / f"e{e}", config, shapes, args.rank, generator)
    write_gate(args.folder / "xlora", config, args.experts, len(shapes) * args.blocks, generator)


def arguments() -> argparse.Namespace:
    """The command line, `--like` filled in."""
    like = parser().parse_known_args()[0].like
    result = parser()
    result.set_defaults(**LIKE.get(like, {}))
    return result.parse_args()


def parser() -> argparse.ArgumentParser:
    """The defaults are the bench model: about 125 M parameters."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("folder", type=Path)
    for name, value in {
        "hidden": 768, "blocks": 12, "intermediate": 2048, "heads": 12, "kv-heads": 4, "vocab": 32000,
        "positions": 4096, "experts": 4, "rank": 16, "seed": 0,
    }.items():  # fmt: skip
        result.add_argument(f"--{name}", type=int, default=value)
    result.add_argument("--like", choices=list(LIKE))
    result.add_argument("--family", choices=list(CONFIGS), default="llama")
    result.add_argument("--dtype", choices=list(DTYPES), default="float32")
    result.add_argument("--targets", nargs="+", default=[*ATTENTION, *MLP])
    return result


def module_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """Target -> (out, in)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    dim = hidden // config.num_attention_heads
    kv = config.num_key_value_heads * dim
    return {
        "q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip


def module_path(block: int, target: str) -> str:
    """The Hugging Face path of a projection."""
    return f"model.layers.{block}.{'self_attn' if target in ATTENTION else 'mlp'}.{target}"


def write_base(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, generator: torch.Generator) -> None:
    """One shard a block, one for the rest."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    count, total = config.num_hidden_layers + 1, 0
    for i, tensors in enumerate(shard_tensors(config, dtype, generator)):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def shard_tensors(
    config: PreTrainedConfig, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    """Random weights of the scale that keeps activations near 1."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield {
        "model.embed_tokens.weight": random((vocab, hidden), 1.0, dtype, generator),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": random((vocab, hidden), hidden**-0.5, dtype, generator),
    }
    for block in range(config.num_hidden_layers):
        tensors = {
            f"{module_path(block, target)}.weight": random(shape, shape[1] ** -0.5, dtype, generator)
            for target, shape in module_shapes(config).items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        yield tensors


def write_expert(
    folder: Path, config: PreTrainedConfig, shapes: dict[str, tuple[int, int]], rank: int, generator: torch.Generator
) -> None:
    """A PEFT LoRA folder."""
    folder.mkdir(parents=True)
    tensors = {}
    for block in range(config.num_hidden_layers):
        for target, (out, inner) in shapes.items():
            prefix = f"base_model.model.{module_path(block, target)}"
            tensors[f"{prefix}.lora_A.weight"] = random((rank, inner), inner**-0.5, torch.float32, generator)
            tensors[f"{prefix}.lora_B.weight"] = random((out, rank), 0.1 * rank**-0.5, torch.float32, generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": sorted(shapes), "base_model_name_or_path": "../../base", "peft_version": "0.21.2",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))


def write_gate(folder: Path, config: PreTrainedConfig, experts: int, sites: int, generator: torch.Generator) -> None:
    """A layerwise X-LoRA gate of depth 1 in PEFT's layout."""
    folder.mkdir(parents=True)
    outputs = sites * experts
    prefix = "base_model.internal_xlora_classifier.layers.0"
    tensors = {
        f"{prefix}.weight": random((outputs, config.hidden_size), config.hidden_size**-0.5, torch.float32, generator),
        f"{prefix}.bias": torch.zeros(outputs),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "XLORA", "task_type": "CAUSAL_LM", "hidden_size": config.hidden_size,
        "adapters": {str(e): f"../experts/e{e}" for e in range(experts)}, "layerwise_scalings": True,
        "xlora_depth": 1, "enable_softmax": True, "softmax_temperature": 1.0, "scaling_pass_value": 0.0,
        "base_model_name_or_path": "../base", "peft_version": "0.21.2",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))


def random(shape: tuple[int, ...], scale: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Seeded normal values."""
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


if __name__ == "__main__":
    main()
