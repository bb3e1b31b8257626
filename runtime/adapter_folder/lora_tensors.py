"""The tensors of a PEFT LoRA, DoRA or AdaLoRA file -> checked deltas by module path."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.adapter_folder.files import shown_path
from runtime.adapter_folder.lora_config import ENDS, AdaLoraFields, LoraFields
from runtime.adapter_folder.patterns import TargetRule
from runtime.adapter_folder.problems import gathering, listed, shortened
from runtime.adapter_folder.safetensors_file import FLOAT_DTYPES, SafetensorsFile, TensorEntry
from runtime.errors import InputError, raise_all
from runtime.manifest import AdapterKind

CONFIG_NAME = "adapter_config.json"
WEIGHTS_STEM = "adapter_model"
KEY_PREFIX = "base_model.model."
MAX_FEATURES = 1 << 22  # of one module; no real layer or vocabulary comes near

_LORA_KEY = re.compile(
    r"base_model\.model\.(?P<path>[A-Za-z0-9_.]{1,400})\."
    r"(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|lora_[ABE])"
    r"(?P<form>(?<=vector)(?:\.default)?\.weight)?"  # DoRA's magnitudes were a ParameterDict, then a module
)
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
# The tensors of one module, A and B first; a kind has one form for Linear and perhaps one for Embedding.
FORMS: dict[AdapterKind, tuple[tuple[str, ...], ...]] = {
    AdapterKind.LORA: (_LINEAR, _EMBEDDING),
    AdapterKind.DORA: ((*_LINEAR, "lora_magnitude_vector"), (*_EMBEDDING, "lora_magnitude_vector")),
    AdapterKind.ADALORA: (("lora_A", "lora_B", "lora_E"),),
}
# Weights of the base beside the LoRA: PEFT saves adapted embeddings and heads; other tools the whole model.
_SAVED_BASE_KEY = re.compile(r"base_model\.model\.(?P<path>[A-Za-z0-9_.]{1,400}?)(?:\.base_layer)?\.(?:weight|bias)")
_OF_ADAPTER = re.compile(r"\.(?:lora_|token_adapter\.|modules_to_save\.|internal_xlora_classifier\.)")


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """One module's update as a folder holds it: delta(x) = scale * (x aT) bT, all float32.

    Linear: a [r, in], b [out, r]. Embedding: a [r, vocab], b [dim, r]. AdaLoRA: a holds the singular values.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float
    magnitude: NDArray[np.float32] | None = None  # DoRA's [out]


def saved_base_tensors(file: SafetensorsFile) -> dict[str, str]:
    """Tensors of the base stored beside the LoRA: key in the file -> key in the base model's state dict.

    Those of modules_to_save look the same; who calls this knows which they are.
    """
    found = {}
    for key in file.entries:
        match = _SAVED_BASE_KEY.fullmatch(key)
        if match and not _OF_ADAPTER.search(key):
            found[key] = f"{match['path']}.{key.rpartition('.')[2]}"
    return found


def read_deltas(
    file: SafetensorsFile, fields: LoraFields | AdaLoraFields, replacing: frozenset[str] = frozenset()
) -> dict[str, LoraTensors]:
    """All deltas in file order; every problem of keys, shapes, dtypes and values is raised at once."""
    where = shown_path(file.path)
    problems: list[InputError] = []
    modules = _group_keys(file, fields.kind, replacing, problems)
    rule = fields.target_rule()
    deltas = {}
    for path, keys in modules.items():
        with gathering(problems):
            if not (fields.ties_loras and path in ENDS):  # PEFT takes a tied head out of the targets
                _check_target(path, rule, where)
            _check_pair(path, keys, file, fields.rank_of(path))
            deltas[path] = _read_delta(path, keys, file, fields)
    if not modules and not problems:
        problems.append(InputError("holds no LoRA tensors", where=where, fix="save it again", code="E_TENSOR"))
    if isinstance(fields, AdaLoraFields):
        strange = sorted(set(fields.rank_pattern or {}) - {f"{path}.lora_E" for path in modules})
        if strange and not problems:
            what = f"rank_pattern of {CONFIG_NAME} names modules without tensors"
            problems.append(InputError(what, where=where, got=_quoted(strange), fix="save it again", code="E_KEYS"))
    raise_all(where, shortened(problems))
    return deltas


def require_touched(deltas: dict[str, LoraTensors], weights: Path) -> dict[str, LoraTensors]:
    """The deltas that have a rank: AdaLoRA may have pruned some, but not all."""
    touched = {path: delta for path, delta in deltas.items() if delta.a.shape[0]}
    if not touched:
        what = "AdaLoRA kept no rank of any module: the adapter changes nothing"
        raise InputError(what, where=shown_path(weights), fix="leave it out", code="E_TENSOR")
    return touched


def _group_keys(
    file: SafetensorsFile, kind: AdapterKind, replacing: frozenset[str], problems: list[InputError]
) -> dict[str, tuple[str, ...]]:
    """Module path -> its keys, A and B first; what has no form of the kind, or is incomplete, is a problem."""
    where = shown_path(file.path)
    parts: dict[str, dict[str, str]] = {}
    unknown = set(file.entries) - set(saved_base_tensors(file)) - replacing
    for key in file.entries:
        match = _LORA_KEY.fullmatch(key)
        if match and any(match["part"] in form for form in FORMS[kind]):
            found = parts.setdefault(match["path"], {})
            if match["part"] not in found:  # the same tensor in another form stays unknown
                unknown.discard(key)
                found[match["part"]] = key
    problems.extend(_unknown_keys(sorted(unknown), where))
    modules = {}
    for path, found in parts.items():
        form = next((form for form in FORMS[kind] if set(form) == set(found)), None)
        if form is not None:
            modules[path] = tuple(found[part] for part in form)
            continue
        problems.append(
            InputError(
                f"module {path} has no complete set of {kind} tensors",
                where=where,
                got=listed(found.values()),
                need=" or ".join(" and ".join(form) for form in FORMS[kind]),
                fix="save it again",
                code="E_KEYS",
            )
        )
    return modules


def _unknown_keys(keys: list[str], where: str) -> Iterator[InputError]:
    """Name the tensors that belong to no plain LoRA, with a reason for the forms we know."""
    reasons = {
        "lora_magnitude_vector": "DoRA's magnitudes, but use_dora is not set",
        "lora_E": "AdaLoRA's singular values, but the config is LoRA's",
        "lora_B.bias": "lora_bias is added ungated",
        "token_adapter": "new rows of an embedding, but trainable_token_indices does not name it",
        "base_model.lora_model.": "this is an expert sub-folder of an X-LoRA save, not a LoRA; "
        "give the folder the expert was trained in",
        "internal_xlora_classifier": "this is an X-LoRA gate, not a LoRA",
    }
    left = keys
    for part, reason in reasons.items():
        if matching := [key for key in left if part in key]:
            left = [key for key in left if part not in key]
            yield InputError(f"unexpected tensors: {reason}", where=where, got=_quoted(matching), code="E_KEYS")
    if left:
        need = f"{KEY_PREFIX}<module>.lora_A.weight, .lora_B.weight, or lora_embedding_A, _B"
        yield InputError("unexpected tensors", where=where, got=_quoted(left), need=need, code="E_KEYS")


def _quoted(keys: list[str]) -> str:
    return listed(ascii(key)[:200] for key in keys)


def _check_target(path: str, rule: TargetRule | None, where: str) -> None:
    if rule is not None and not rule(path):
        raise InputError(
            f"module {path} has LoRA tensors but is not among the targets of {CONFIG_NAME}", where=where,
            fix="the config and the weights belong to different adapters; save them together", code="E_KEYS",
        )  # fmt: skip


def _check_pair(path: str, keys: tuple[str, ...], file: SafetensorsFile, rank: int) -> None:
    """A is [r, in], B is [out, r] with the configured rank, E [r, 1], magnitudes [out]; all of a float dtype."""
    where = shown_path(file.path)
    entries = [file.entries[key] for key in keys]
    problems: list[InputError] = []
    for key, entry in zip(keys, entries, strict=True):
        if entry.dtype not in FLOAT_DTYPES:
            problems.append(_wrong(f"tensor {key} is not of a float dtype", where, entry.dtype, "F32, F16, BF16, F64"))
        if len(entry.shape) == 4:
            problems.append(_wrong(f"tensor {key} belongs to a Conv2d", where, str(entry.shape), "Linear or Embedding"))
    a, b = entries[:2]
    says = f"rank {rank} of {path} as {CONFIG_NAME} says"
    if not problems and not (_is_matrix(a, rank) and a.shape[0] == rank):
        problems.append(
            _wrong(f"tensor {keys[0]} has the wrong shape", where, str(list(a.shape)), f"[{rank}, in]: {says}")
        )
    if not problems and not (_is_matrix(b, rank) and b.shape[1] == rank):
        problems.append(
            _wrong(f"tensor {keys[1]} has the wrong shape", where, str(list(b.shape)), f"[out, {rank}]: {says}")
        )
    for key, entry in zip(keys[2:], entries[2:], strict=True):
        need = (rank, 1) if key.endswith(".lora_E") else b.shape[:1]
        if not problems and entry.shape != need:
            problems.append(_wrong(f"tensor {key} has the wrong shape", where, str(list(entry.shape)), str(list(need))))
    raise_all(where, problems)


def _is_matrix(entry: TensorEntry, rank: int) -> bool:
    """Two sizes, none absurd; only a rank may be 0, where the config says so."""
    return len(entry.shape) == 2 and all(0 < size <= MAX_FEATURES or size == rank == 0 for size in entry.shape)


def _wrong(what: str, where: str, got: str, need: str) -> InputError:
    return InputError(what, where=where, got=got, need=need, code="E_TENSOR")


def _read_delta(
    path: str, keys: tuple[str, ...], file: SafetensorsFile, fields: LoraFields | AdaLoraFields
) -> LoraTensors:
    """One module's tensors; AdaLoRA's singular values go into A."""
    a, b, *third = (file.read_finite(key) for key in keys)
    scale = fields.scale_of(path)
    if fields.kind is AdapterKind.ADALORA:
        return LoraTensors(a * third[0], b, scale)
    return LoraTensors(a, b, scale, *third)
