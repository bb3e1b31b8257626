"""What adapters as inputs cost a decode step on this CPU, by rank columns loaded; writes Markdown to docs/hot-bench.md.

Three ways to hold experts of the same total rank: weights of the graph; inputs with as many columns as are loaded; the
same inputs always N columns wide, zeros where nothing is loaded. And what a load takes.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from exporter.build_bundle import build
from exporter.spec import AdapterSource, BuildSpec, HotSpec
from runtime.adapter_inputs import LORA_INDEX, RANK, stack_specs
from runtime.bundle import Bundle
from runtime.manifest import VerifyLevel
from runtime.model import Model, load
from runtime.passes import constant
from runtime.rows import Rows
from runtime.stacks import Stack
from runtime.tensors import DTYPES, shape_of

SIZES = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 512,
}  # fmt: skip
RANK_EACH, MOST = 16, 64
ROUNDS, STEPS = 7, 40


def main() -> None:
    """Build, measure in alternating rounds, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/hot-bench.md"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        text = measure(Path(name), args.threads)
    args.out.write_text(text, encoding="utf-8")
    print(text)


def measure(folder: Path, threads: int) -> str:
    """The table."""
    base = write_base(folder / "base")
    folders = [write_lora(folder / f"e{n}", base, n) for n in range(MOST // RANK_EACH)]
    hot = built(folder / "hot", base, [], HotSpec(MOST, len(folders), ("all-linear",)))
    weights = {count: built(folder / f"w{count}", base, folders[:count], None) for count in (1, len(folders))}
    ways: dict[str, tuple[Model, Stack | None, int]] = {}
    model = load(hot.root, threads=threads)
    assert model.adapters is not None
    seconds = []
    for count in range(len(folders) + 1):
        if count:
            began = perf_counter()
            model.load_adapter(f"e{count}", folders[count - 1])
            seconds.append(perf_counter() - began)
        if count in (0, 1, len(folders)):
            stack = model.adapters.current.stack
            ways[f"inputs, {RANK_EACH * count} columns loaded, R = {stack.rank}"] = model, stack, len(folders)
            ways[f"inputs, {RANK_EACH * count} columns loaded, always R = {MOST}"] = (
                model, padded(hot, stack), len(folders),
            )  # fmt: skip
    for count, bundle in weights.items():
        ways[f"weights, {RANK_EACH * count} columns"] = load(bundle.root, threads=threads), None, count
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):  # alternating: a busy machine slows all alike
        for way, (session, stack, experts) in ways.items():
            times[way].append(step_seconds(session, stack, experts))
    best = {way: 1000 * min(found) for way, found in times.items()}
    lines = [f"| {way} | {best[way]:.2f} |" for way in sorted(best)]
    return "\n".join([
        f"One row, one token a step, 64 tokens in the cache, best of {ROUNDS} rounds of {STEPS} steps, in ms; "
        f"{threads} thread of {cpu_name()}, onnxruntime {onnxruntime.__version__}, 2026-11-22. A Llama of 8 blocks, "
        f"hidden size 512 ({sum(p.stat().st_size for p in base.glob('*.safetensors')) / 1e6:.0f} MB), every linear "
        f"module adapted, {MOST // RANK_EACH} experts of rank {RANK_EACH} (a stack of {MOST} columns is "
        f"{model.adapters.current.stack.nbytes / 1e6:.1f} MB). Written by `scripts/bench_hot.py`.",
        "", "| adapters | ms a step |", "|---|---|", *lines, "",
        f"Loading an adapter beside up to {MOST - RANK_EACH} columns took {1000 * min(seconds):.0f} to "
        f"{1000 * max(seconds):.0f} ms, reading and checking its folder included.", "",
    ])  # fmt: skip


def step_seconds(model: Model, stack: Stack | None, experts: int) -> float:
    """Of one decode step, on average; all experts are on."""
    session = model.session
    session.allocate(1, stack)
    row = np.full((1, experts), 1 / experts, np.float32)

    def step(width: int) -> None:
        tokens = np.ones((1, width), np.int64)
        last = np.array([[width - 1]])
        session.step(Rows(tokens, np.array([width]), slice(0, 1), constant(row, tokens), last))

    step(64)
    for _ in range(3):
        step(1)
    began = perf_counter()
    for _ in range(STEPS):
        step(1)
    return (perf_counter() - began) / STEPS


def padded(bundle: Bundle, stack: Stack) -> Stack:
    """The same adapters in MOST columns."""
    hot = bundle.manifest.hot
    assert hot is not None
    tensors = {}
    for spec in stack_specs(hot.sites, "float32"):
        tensors[spec.name] = np.zeros(shape_of(spec, {RANK: MOST}), DTYPES[spec.dtype])
        axis = 0 if spec.name == LORA_INDEX else spec.shape.index(RANK)
        places = tuple(slice(stack.rank) if place == axis else slice(None) for place in range(len(spec.shape)))
        tensors[spec.name][places] = stack.tensors[spec.name]
    return Stack(tensors, MOST)


def built(out: Path, base: Path, folders: Sequence[Path], hot: HotSpec | None) -> Bundle:
    """A bundle, quickly verified."""
    sources = tuple(AdapterSource(folder, folder.name) for folder in folders)
    return build(replace(BuildSpec(sources, str(base), threads=1, verify=VerifyLevel.QUICK), hot=hot, out=out))


def write_base(folder: Path) -> Path:
    """A random Llama."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(folder)
    return folder


def write_lora(folder: Path, base: Path, seed: int) -> Path:
    """A random LoRA on every linear module, as PEFT writes it."""
    folder.mkdir()
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = AutoModelForCausalLM.from_pretrained(base)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in names:
            wide, tall = module.in_features, module.out_features
            key = f"base_model.model.{path}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(RANK_EACH, wide, generator=generator) * wide**-0.5
            tensors[f"{key}B.weight"] = torch.randn(tall, RANK_EACH, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ", ".join(f'"{name}"' for name in names)
    config = f'{{"peft_type": "LORA", "r": {RANK_EACH}, "lora_alpha": {RANK_EACH}, "target_modules": [{targets}]}}'
    (folder / "adapter_config.json").write_text(config)
    return folder


def cpu_name() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
