"""One PEFT LoRA folder -> deltas by module path."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.adapters import LoraDelta
from exporter.checkpoints.files import is_folder, require_weights, shown_path
from exporter.checkpoints.lora_config import LoraFields, parse_lora_config
from exporter.checkpoints.patterns import TargetRule
from exporter.checkpoints.problems import gathering, listed, shortened
from exporter.checkpoints.strict_json import read_json
from exporter.checkpoints.weights_file import FLOAT_DTYPES, TensorEntry, WeightsFile, is_finite, open_weights
from exporter.errors import ExportError
from runtime.errors import InputError, raise_all

CONFIG_NAME = "adapter_config.json"
WEIGHTS_STEM = "adapter_model"
KEY_PREFIX = "base_model.model."
MAX_FEATURES = 1 << 22  # of one module; no real layer or vocabulary comes near

_LORA_KEY = re.compile(
    r"base_model\.model\.(?P<path>[A-Za-z0-9_.]{1,400})\."
    r"(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<emb>[AB]))"
)
# Embeddings and lm_head whose weights PEFT saves beside their LoRA, or after a resize.
_SAVED_BASE_KEY = re.compile(r"base_model\.model\.(?P<path>[A-Za-z0-9_.]{1,400}?)(?:\.base_layer)?\.(?:weight|bias)")


@dataclass(frozen=True, slots=True)
class LoraFolder:
    """What one LoRA folder holds: deltas by module path, and the rule by which its config selects modules."""

    folder: Path
    fields: LoraFields
    deltas: dict[str, LoraDelta]
    rule: TargetRule | None
    files: tuple[Path, ...]


def read_lora(folder: Path) -> LoraFolder:
    """Read and check a LoRA folder completely; nothing of it is used unless all of it is right."""
    if not is_folder(folder):
        raise ExportError("is not a folder", where=shown_path(folder), need="a LoRA folder", code="E_FILE")
    fields = parse_lora_config(read_json(folder / CONFIG_NAME), folder / CONFIG_NAME)
    weights = require_weights(folder, WEIGHTS_STEM)
    with open_weights(weights) as file:
        deltas = _read_deltas(file, fields)
    return LoraFolder(folder, fields, deltas, fields.target_rule(), (folder / CONFIG_NAME, weights))


def saved_base_tensors(file: WeightsFile) -> dict[str, str]:
    """Tensors of the base stored beside the LoRA: key in the file -> key in the base model's state dict."""
    found = {}
    for key in file.entries:
        if not _LORA_KEY.fullmatch(key) and (match := _SAVED_BASE_KEY.fullmatch(key)):
            path = match["path"]
            if path.rpartition(".")[2] in (
                "embed_tokens",
                "lm_head",
                "wte",
                "embed_in",
                "embed_out",
                "word_embeddings",
            ):
                found[key] = f"{path}.{key.rpartition('.')[2]}"
    return found


def _read_deltas(file: WeightsFile, fields: LoraFields) -> dict[str, LoraDelta]:
    """All deltas in file order; every problem of keys, shapes, dtypes and values is raised at once."""
    where = shown_path(file.path)
    problems: list[InputError] = []
    pairs = _pair_keys(file, where, problems)
    rule = fields.target_rule()
    deltas = {}
    for path, keys in pairs.items():
        with gathering(problems):
            _check_target(path, rule, where)
            _check_pair(path, keys, file, fields.rank_of(path))
            a, b = (_read_side(file, key) for key in keys)
            deltas[path] = LoraDelta(a, b, fields.scale_of(path))
    if not pairs and not problems:
        problems.append(ExportError("holds no LoRA tensors", where=where, fix="save it again", code="E_TENSOR"))
    raise_all(where, shortened(problems))
    return deltas


def _pair_keys(file: WeightsFile, where: str, problems: list[InputError]) -> dict[str, tuple[str, str]]:
    """Module path -> keys of A and B; keys of any other form, and halves of a pair, are problems."""
    sides: dict[str, dict[str, str]] = {}
    unknown = set(file.entries) - set(saved_base_tensors(file))
    for key in file.entries:
        if match := _LORA_KEY.fullmatch(key):
            unknown.discard(key)
            kind = "linear" if match["side"] else "embedding"
            sides.setdefault(match["path"], {})[f"{kind} {match['side'] or match['emb']}"] = key
    problems.extend(_unknown_keys(sorted(unknown), where))
    pairs = {}
    for path, found in sides.items():
        for kind in ("linear", "embedding"):
            if set(found) == {f"{kind} A", f"{kind} B"}:
                pairs[path] = (found[f"{kind} A"], found[f"{kind} B"])
        if path not in pairs:
            problems.append(
                ExportError(
                    f"module {path} has no complete pair of LoRA tensors",
                    where=where,
                    got=listed(found.values()),
                    need="A and B of one kind",
                    fix="save it again",
                    code="E_KEYS",
                )
            )
    return pairs


def _unknown_keys(keys: list[str], where: str) -> Iterator[ExportError]:
    """Name the tensors that belong to no plain LoRA, with a reason for the forms we know."""
    reasons = {
        "lora_magnitude_vector": "DoRA magnitudes cannot be exported",
        "lora_E": "AdaLoRA is not supported here",
        "lora_B.bias": "lora_bias is added ungated",
        "base_model.lora_model.": "this is an expert sub-folder of an X-LoRA save, not a LoRA; "
        "give the folder the expert was trained in",
        "internal_xlora_classifier": "this is an X-LoRA gate, not a LoRA",
    }
    left = keys
    for part, reason in reasons.items():
        if matching := [key for key in left if part in key]:
            left = [key for key in left if part not in key]
            yield ExportError(f"unexpected tensors: {reason}", where=where, got=_quoted(matching), code="E_KEYS")
    if left:
        need = f"{KEY_PREFIX}<module>.lora_A.weight, .lora_B.weight, or lora_embedding_A, _B"
        yield ExportError("unexpected tensors", where=where, got=_quoted(left), need=need, code="E_KEYS")


def _quoted(keys: list[str]) -> str:
    return listed(ascii(key)[:200] for key in keys)


def _check_target(path: str, rule: TargetRule | None, where: str) -> None:
    if rule is not None and not rule(path):
        raise ExportError(
            f"module {path} has LoRA tensors but is not among the targets of {CONFIG_NAME}", where=where,
            fix="the config and the weights belong to different adapters; save them together", code="E_KEYS",
        )  # fmt: skip


def _check_pair(path: str, keys: tuple[str, str], file: WeightsFile, rank: int) -> None:
    """A is [r, in], B is [out, r] with the configured rank, both of a float dtype."""
    where = shown_path(file.path)
    a, b = (file.entries[key] for key in keys)
    problems: list[InputError] = []
    for key, entry in zip(keys, (a, b), strict=True):
        if entry.dtype not in FLOAT_DTYPES:
            problems.append(_wrong(f"tensor {key} is not of a float dtype", where, entry.dtype, "F32, F16, BF16, F64"))
        if len(entry.shape) == 4:
            problems.append(_wrong(f"tensor {key} belongs to a Conv2d", where, str(entry.shape), "Linear or Embedding"))
    if not problems and not (_is_matrix(a) and a.shape[0] == rank):
        need = f"[{rank}, in]: rank {rank} of {path} as {CONFIG_NAME} says"
        problems.append(_wrong(f"tensor {keys[0]} has the wrong shape", where, str(list(a.shape)), need))
    if not problems and not (_is_matrix(b) and b.shape[1] == rank):
        need = f"[out, {rank}]: rank {rank} of {path} as {CONFIG_NAME} says"
        problems.append(_wrong(f"tensor {keys[1]} has the wrong shape", where, str(list(b.shape)), need))
    raise_all(where, problems)


def _is_matrix(entry: TensorEntry) -> bool:
    return len(entry.shape) == 2 and all(0 < size <= MAX_FEATURES for size in entry.shape)


def _wrong(what: str, where: str, got: str, need: str) -> ExportError:
    return ExportError(what, where=where, got=got, need=need, code="E_TENSOR")


def _read_side(file: WeightsFile, key: str) -> torch.Tensor:
    """One tensor as float32 (PEFT, too, lifts fp16 and bf16 adapters to fp32); NaN and infinities are refused."""
    tensor = file.read(key).float()
    if not is_finite(tensor):
        raise ExportError(
            f"tensor {key} holds NaN or infinite values", where=shown_path(file.path), need="finite float32 values",
            fix="the training diverged or the file is damaged; use an earlier save", code="E_VALUE",
        )  # fmt: skip
    return tensor
