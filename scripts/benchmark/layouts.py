"""One checkpoint in the form each peer wants: the same weights, prompts spelled so that all see the same ids."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from scripts.benchmark.environments import Environments
from scripts.benchmark.process import shortened
from scripts.make_large import ATTENTION, MLP, module_path

ROOT = Path(__file__).resolve().parents[2]
CLASSIFIER = "base_model.internal_xlora_classifier.layers.0"
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2: as the checkpoint's bos and eos


class LayoutError(Exception):
    """A peer's own converter failed; the text is its message."""


@dataclass(frozen=True, slots=True)
class Models:
    """One checkpoint in all its forms, each made when it is first asked for."""

    folder: Path
    experts: int
    environments: Environments
    sizes: tuple[str, ...] = ()  # more options of make_large.py

    def path(self, form: str) -> Path:
        """Where this form lies, made if it does not yet."""
        path = self.folder / form
        if not path.exists():
            with _unfinished(path) as part:
                FORMS[form](self, part)
        return path


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete."""
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield part
    part.rename(path)


def write_checkpoint(models: Models, folder: Path) -> None:
    """Base, experts and gate, random and seeded."""
    options = ["--experts", models.experts, *models.sizes]
    run([sys.executable, ROOT / "scripts" / "make_large.py", folder, *options])


def build_bundle(models: Models, folder: Path) -> None:
    """The dynamic graph, and the plain base as the static graph of the empty mix."""
    xlora = models.path("checkpoint") / "xlora"
    command = [sys.executable, "-m", "exporter", "build", "--adapters", xlora, "--out", folder]
    run([*command, "--mode", "dynamic", "static", "--mix", "base", "--verify", "quick", "-q"])


def build_int4(models: Models, folder: Path) -> None:
    """The same with 4-bit weights and head, multiplied with activations of 8 bits, as GenAI's int4 is."""
    xlora = models.path("checkpoint") / "xlora"
    command = [sys.executable, "-m", "exporter", "build", "--adapters", xlora, "--out", folder]
    quantize = ["--quantize", "int4", "--quantize-head", "--quantize-activations", "int8", "--accept-loss"]
    run([*command, *quantize, "--mode", "dynamic", "static", "--mix", "base", "--verify", "quick", "-q"])


def write_mistralrs(models: Models, folder: Path) -> None:
    """base/ with a tokenizer, and one flat xlora/: a file and a config an expert, the classifier, the ordering."""
    checkpoint, final = models.path("checkpoint"), models.folder / "mistralrs"
    config = json.loads((checkpoint / "base" / "config.json").read_text())
    _write_base(checkpoint / "base", folder / "base", config)
    _write_adapters(checkpoint / "xlora", folder / "xlora", config, str(final / "base"))


def _write_base(source: Path, folder: Path, config: dict[str, Any]) -> None:
    """The weights are hard links."""
    folder.mkdir(parents=True)
    for shard in source.glob("*.safetensors*"):
        (folder / shard.name).hardlink_to(shard)
    flat = config | {"rope_theta": config["rope_parameters"]["rope_theta"]}  # where transformers 4 had it
    _write(folder / "config.json", flat)
    _write(folder / "tokenizer.json", word_tokenizer(config["vocab_size"]))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0]['content'] }}",
            "bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "add_bos_token": False,
        },
    )  # fmt: skip


def word_tokenizer(vocab: int) -> dict[str, Any]:
    """A tokenizer.json in which token 17 is the word w17.

    Byte-level, since mistral.rs knows no decoder of plain words: a word carries the space before it, as the sign Ġ.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
    words = {word: token for token, word in enumerate(SPECIAL)}
    words |= {f"\u0120w{token}": token for token in range(len(SPECIAL), vocab)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": token, "content": word, "special": True, **flags} for token, word in enumerate(SPECIAL)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": added, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, byte_level]},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": SPECIAL[0]},
    }  # fmt: skip


def _write_adapters(xlora: Path, folder: Path, config: dict[str, Any], base: str) -> None:
    """The base's folder must be the same text in three places; no expert's name may be part of another's."""
    folder.mkdir()
    gate = json.loads((xlora / "adapter_config.json").read_text())
    names = [f"expert-{number:03}" for number in range(len(gate["adapters"]))]
    for key, name in enumerate(names):
        expert = xlora / gate["adapters"][str(key)]
        shutil.copy(expert / "adapter_model.safetensors", folder / f"{name}.safetensors")
        shutil.copy(expert / "adapter_config.json", folder / f"{name}.json")
    classifier = load_file(xlora / "adapter_model.safetensors")
    save_file(
        {name.replace(CLASSIFIER, "last"): tensor for name, tensor in classifier.items()},
        folder / "xlora_classifier.safetensors",
    )
    _write(folder / "xlora_config.json", gate | {"base_model_id": base, "adapters": names})
    sites = [module_path(block, kind) for block in range(config["num_hidden_layers"]) for kind in (*ATTENTION, *MLP)]
    layers = {site: number for number, site in enumerate(sites)}
    _write(folder / "ordering.json", {"order": names, "layers": layers, "base_model_id": base})


def build_genai(precision: str) -> Callable[[Models, Path], None]:
    """Its own builder makes the base; it needs torch, so it runs in our environment with only its package added."""

    def build(models: Models, folder: Path) -> None:
        base = models.path("mistralrs") / "base"  # it wants a tokenizer, too
        models.environments.python("genai")
        added = models.folder / "genai-builder"
        added.mkdir(exist_ok=True)
        if not (added / "onnxruntime_genai").exists():
            (added / "onnxruntime_genai").symlink_to(models.environments.packages("genai") / "onnxruntime_genai")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", base, "-o", folder]
        run([*command, "-p", precision, "-e", "cpu", "-c", models.folder / "cache"], PYTHONPATH=str(added))

    return build


FORMS: dict[str, Callable[[Models, Path], None]] = {
    "checkpoint": write_checkpoint,
    "bundle": build_bundle,
    "bundle-int4": build_int4,
    "mistralrs": write_mistralrs,
    "genai-fp32": build_genai("fp32"),
    "genai-int4": build_genai("int4"),
}


def run(command: list[object], **variables: str) -> None:
    """Run to its end, quietly; LayoutError has its last line."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False, errors="replace"
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise LayoutError(shortened(f"{' '.join(words[1:4])} failed: {lines[-1] if lines else 'it said nothing'}"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
