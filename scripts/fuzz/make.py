"""A drawn case as folders on disk, written by transformers and PEFT: base, experts, gate.

This module and `oracle` and `compare` import nothing of this package, for their source goes into every repro as it is.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the modelling code's own loops
TRUTH = "gate-truth"  # the gate in PEFT's layout, complete: what the oracle reads


def write_checkpoint(case: Mapping[str, Any], folder: Path) -> None:
    """`folder`/base, /experts/NAME, and with a gate /gate as it is published and /gate-truth as it is."""
    write_base(case["base"], folder / "base")
    model = load_base(folder / "base")
    for expert in [*case["experts"], *case.get("late", [])]:
        write_expert(expert, model, folder / "experts" / expert["name"])
    if case["gate"] is not None:
        write_gate(case, folder)


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The base through transformers' public loader, as PEFT's X-LoRA needs it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **EAGER).eval()
    model.config.use_cache = False
    return model


# --- the base ---


def write_base(base: Mapping[str, Any], folder: Path) -> None:
    """A random model far from its initialisation: no norm is one, no bias is zero."""
    config = AutoConfig.for_model(base["family"], **base["config"])
    generator = torch.Generator().manual_seed(base["seed"])
    with torch.random.fork_rng():
        torch.manual_seed(base["seed"])
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.3 * noise)
            else:  # the default is so small that a tiny model hardly uses its attention
                parameter.copy_(noise * 0.8 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 2 else 4 * parameter)
    model = model.to(DTYPES[base["dtype"]])
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    shards = {} if base["shards"] == 1 else {"max_shard_size": size // base["shards"] + 1}
    model.save_pretrained(folder, **shards)
    edit_json(folder / "config.json", lambda raw: config_as_stored(raw, config, base))
    if base.get("generation"):
        path = folder / "generation_config.json"
        path.exists() or path.write_text("{}")
        edit_json(path, lambda raw: raw | base["generation"])
    if base["tokenizer"] == "old_files":
        write_old_tokenizer(folder, base["config"]["vocab_size"])
    elif base["tokenizer"]:
        write_tokenizer(folder, base["tokenizer"], base["config"]["vocab_size"])


def config_as_stored(raw: dict[str, Any], config: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as other tools write it: without defaults, with the rope's older names, with a tie that is none."""
    rope = raw.get("rope_parameters")
    if base["form"] == "minimal":
        kept = {*base["config"], "model_type", "architectures", "dtype"}
        raw = {key: value for key, value in raw.items() if key in kept}
    if base["form"] == "old_rope" and isinstance(rope, dict) and "rope_type" in rope:
        raw = {key: value for key, value in raw.items() if key != "rope_parameters"} | old_rope(rope)
    if base["flag_lies"] == "tied":
        raw = raw | {"tie_word_embeddings": True}
    return raw


def old_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `partial_rotary_factor` and `rope_scaling`, as transformers 4 wrote them."""
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    old = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return old | ({} if rope["rope_type"] == "default" else {"rope_scaling": rest})


def write_tokenizer(folder: Path, kind: str, vocab_size: int) -> None:
    """Bytes and a few special tokens; `config_only`: one of them stands in tokenizer_config.json alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())][:vocab_size]
    vocab = {name: number for number, name in enumerate(names)}
    while len(vocab) < vocab_size - 2:
        vocab[f"<x{len(vocab)}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")
    if kind == "added":
        fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.save_pretrained(folder)
    if kind == "config_only":
        added = {
            "content": "<|im_start|>",
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
        token = {str(len(vocab)): added}
        edit_json(folder / "tokenizer_config.json", lambda raw: raw | {"added_tokens_decoder": token})


def write_old_tokenizer(folder: Path, vocab_size: int) -> None:
    """vocab.json and merges.txt, as GPT-2's tokenizer came before there was a tokenizer.json."""
    from tokenizers import pre_tokenizers

    names = ["<pad>", "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "1+"][:vocab_size]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n1 +\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 128})
    )


# --- experts ---


def lora_config(expert: Mapping[str, Any]) -> Any:
    """The PEFT config of an expert."""
    from peft import AdaLoraConfig, LoraConfig

    settings = dict(expert["config"], task_type="CAUSAL_LM")
    return AdaLoraConfig(**settings) if expert["kind"] == "adalora" else LoraConfig(**settings)


def write_expert(expert: Mapping[str, Any], model: Any, folder: Path) -> None:
    """An adapter that PEFT writes, with every trained tensor far from where it began."""
    from peft import get_peft_model

    base = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(expert["seed"])
        config = lora_config(expert)
        live = get_peft_model(base, config)
        if expert["pruned"]:
            config.rank_pattern = pruned_ranks(live, expert)
            live = get_peft_model(copy.deepcopy(model), config)
    live.peft_config["default"].base_model_name_or_path = model.config.name_or_path
    generator = torch.Generator().manual_seed(expert["seed"])
    with torch.no_grad():
        for name, parameter in sorted(live.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                parameter.copy_(noise * expert["scale"])
            elif name.endswith(".bias") and expert["config"].get("bias", "none") != "none":
                parameter.add_(0.3 * noise * parameter.requires_grad)
            elif ".modules_to_save." in name or "trainable_tokens_delta" in name:
                parameter.add_(0.3 * noise)
    live.save_pretrained(folder)
    if expert["dtype"] != "float32":
        path = folder / "adapter_model.safetensors"
        own = {key for key in load_file(path) if "lora_" in key}  # what is of the base stays as the base has it
        tensors = {
            key: value.to(DTYPES[expert["dtype"]] if key in own else value.dtype)
            for key, value in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})


def pruned_ranks(live: Any, expert: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Which of the ranks AdaLoRA has left, by its tensor's name; some modules lose all."""
    generator = torch.Generator().manual_seed(expert["seed"])
    names = sorted(name for name, _ in live.named_parameters() if ".lora_E." in name)
    kept = {}
    for name in names:
        key = name.removeprefix("base_model.model.").removesuffix(".default")
        kept[key] = (torch.rand(expert["config"]["init_r"], generator=generator) < 0.6).tolist()
    return kept


# --- gates ---

MARK = "model.@."  # PEFT's X-LoRA leaves a key alone that begins so, and puts "model." before it


@contextmanager
def any_prefix() -> Iterator[None]:
    """Let PEFT's X-LoRA load experts of any backbone: its loader cuts keys until they begin with "model."."""
    import peft.tuners.xlora.model as xlora
    import peft.utils.save_and_load as files

    read, put = files.load_peft_weights, xlora.set_peft_model_state_dict

    def marked(*args: Any, **settings: Any) -> dict[str, Any]:
        return {MARK + key.removeprefix("base_model.model."): value for key, value in read(*args, **settings).items()}

    def unmarked(model: Any, weights: Mapping[str, Any], **settings: Any) -> Any:
        return put(model, {key.replace(f"model.{MARK}", "model."): value for key, value in weights.items()}, **settings)

    with (
        mock.patch.object(files, "load_peft_weights", marked),
        mock.patch.object(xlora, "set_peft_model_state_dict", unmarked),
    ):
        yield


def write_gate(case: Mapping[str, Any], folder: Path) -> None:
    """A random gate, first complete as the oracle's, then as its layout has it."""
    from peft import XLoraConfig, get_peft_model

    gate, model = case["gate"], load_base(folder / "base")
    experts = {expert["name"]: folder / "experts" / expert["name"] for expert in case["experts"]}
    adapters = {str(column): str(path) for column, path in enumerate(experts.values())}
    width = model.get_output_embeddings().in_features
    config = XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, hidden_size=width, **gate["config"])
    config.base_model_name_or_path = str(folder / "base")
    with any_prefix():
        live = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(gate["seed"])
    with torch.no_grad():
        for name, parameter in sorted(live.base_model.internal_xlora_classifier.named_parameters()):
            has_none = name.endswith("bias") and not gate.get("use_bias", True)
            parameter.copy_(0.0 * parameter if has_none else torch.randn(parameter.shape, generator=generator))
    state = live.base_model.internal_xlora_classifier.state_dict()
    complete = {f"base_model.internal_xlora_classifier.{key}": value.clone() for key, value in state.items()}
    live.save_pretrained(folder / "gate")
    shutil.copytree(folder / "gate", folder / TRUTH)
    _complete(folder / TRUTH, complete)
    if gate["layout"] == "peft":
        _complete(folder / "gate", complete)
    if gate["layout"] == "original":
        shutil.rmtree(folder / "gate")
        _write_original(gate, complete, experts, width, folder)


def _complete(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As PEFT 0.19 saved it: all gate layers, no sub-folders."""
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for sub_folder in [path for path in folder.iterdir() if path.is_dir()]:
        shutil.rmtree(sub_folder)


def _write_original(
    gate: Mapping[str, Any], complete: Mapping[str, torch.Tensor], experts: Mapping[str, Path], width: int, folder: Path
) -> None:
    """The layout of EricLBuehler/xlora: experts inside under their names, inner.* and last."""
    out = folder / "gate"
    for name, path in experts.items():
        shutil.copytree(path, out / name)
    fields = {
        "hidden_size": width, "device": "cpu", "use_bias": gate["use_bias"], "enable_relu_and_dropout": gate["relu"],
        "use_trainable_adapters": False, "base_model_id": str(folder / "base"),
        "adapters": list(experts) if gate["as_list"] else {name: f"./{name}" for name in experts},
    } | {"top_k_lora": None} | gate["config"]  # fmt: skip
    (out / "xlora_config.json").write_text(json.dumps(fields))
    names = sorted({key.rpartition(".")[0] for key in complete}, key=lambda name: int(name.rpartition(".")[2]))
    step = 3 if gate["relu"] else 1
    tensors = {}
    for place, name in enumerate(names):
        new = "last" if place == len(names) - 1 else f"inner.{step * place}"
        tensors[f"{new}.weight"] = complete[f"{name}.weight"].clone()
        if gate["use_bias"]:
            tensors[f"{new}.bias"] = complete[f"{name}.bias"].clone()
    save_file(tensors, out / "xlora_classifier.safetensors")


# --- the command ---


def build_arguments(case: Mapping[str, Any], out: str = "bundle") -> list[str]:
    """What `python -m exporter` is called with, in the case's folder."""
    named = [f"{expert['name']}=experts/{expert['name']}" for expert in case["experts"]]
    if case["gate"] is None:
        sources = ["--adapters", *named]
    elif case["gate"]["named"]:
        keyed = case["gate"]["layout"] != "original"
        sources = [
            "--adapters",
            *(f"{column}:{word}" if keyed else word for column, word in enumerate(named)),
            "--gate",
            "gate",
        ]
    else:
        sources = ["--adapters", "gate"]
    base = ["--base", "base"] if case["build"]["names_base"] else []
    return ["build", *base, *sources, *case["build"]["arguments"], "--out", out, "--quiet"]


def edit_json(path: Path, change: Any) -> None:
    """Replace a JSON file's content by `change(content)`."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
