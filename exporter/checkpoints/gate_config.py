"""The gate's settings in both layouts: PEFT's adapter_config.json and the original library's xlora_config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporter.errors import ExportError
from runtime.adapter_folder.files import is_file, shown_path
from runtime.adapter_folder.json_files import read_json
from runtime.adapter_folder.lora_config import require_peft_type
from runtime.adapter_folder.problems import gathering, problems_from_schema, shown
from runtime.errors import InputError, raise_all
from runtime.manifest import TopkSoftmax

PEFT_CONFIG = "adapter_config.json"
ORIGINAL_CONFIG = "xlora_config.json"
FIRST_TOKENWISE = (0, 18)  # PEFT: the top-k softmax per token (peft#2793); before it ran over the flattened batch

Key = Annotated[str, Field(min_length=1, max_length=256)]
StoredPath = Annotated[str, Field(max_length=4096)]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
Weight = Annotated[float, Field(ge=-65_536, le=65_536)]


class Layout(StrEnum):
    """Who wrote the checkpoint."""

    PEFT = "peft"
    ORIGINAL = "original"


class GateFields(BaseModel):
    """The fields of either layout; the last three exist in the original library only."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    hidden_size: Size
    adapters: Annotated[dict[Key, StoredPath] | list[Key], Field(min_length=1, max_length=1024)]
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: Annotated[int, Field(ge=1, le=64)] = 1
    xlora_size: Size = 2048
    xlora_dropout_p: Annotated[float, Field(ge=0, le=1)] = 0.2
    use_trainable_adapters: bool = False
    # Below 1e-3 the softmax overflows (fault R31).
    softmax_temperature: Annotated[float, Field(ge=1e-3, le=1e6)] = 1.0
    top_k_lora: Annotated[int, Field(ge=1)] | None = None
    scaling_pass_value: Weight | None = 0.0
    global_scaling_weight: Weight = 1.0
    base_model_name_or_path: Annotated[str, Field(max_length=4096)] | None = None
    peft_version: Annotated[str, Field(max_length=200)] | None = None
    base_model_id: Annotated[str, Field(max_length=4096)] | None = None
    use_bias: bool = True
    enable_relu_and_dropout: bool = True


@dataclass(frozen=True, slots=True)
class GateFolder:
    """A gate folder's settings; `stored` maps each key to its stored path, in gate column order."""

    folder: Path
    layout: Layout
    fields: GateFields
    stored: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def base_name(self) -> str | None:
        """The base model as the config names it."""
        return self.fields.base_model_name_or_path or self.fields.base_model_id


_PEFT_ONLY_IGNORED = frozenset({"task_type", "peft_type", "auto_mapping", "inference_mode", "revision"})
# stop_token_id belonged to an early pooled classifier and is unused since.
_ORIGINAL_ONLY_IGNORED = frozenset({"device", "stop_token_id", "model_type"})
_REFUSED = {"use_mean_pool": "the pooled classifier of early X-LoRA versions looks at the whole sequence"}


def layout_of(folder: Path) -> Layout | None:
    """Which X-LoRA layout the folder has; None when it is no X-LoRA checkpoint."""
    if is_file(folder / ORIGINAL_CONFIG):
        return Layout.ORIGINAL
    if is_file(folder / PEFT_CONFIG) and read_json(folder / PEFT_CONFIG).get("peft_type") == "XLORA":
        return Layout.PEFT
    return None


def read_gate_config(folder: Path) -> GateFolder:
    """The checked settings of an X-LoRA folder; all that is wrong with the file is raised at once."""
    layout = layout_of(folder) or Layout.PEFT
    path = folder / (ORIGINAL_CONFIG if layout is Layout.ORIGINAL else PEFT_CONFIG)
    raw = read_json(path)
    if layout is Layout.PEFT:
        require_peft_type(raw, "XLORA", shown_path(path))
    problems = _refused_fields(raw, layout, shown_path(path))
    try:
        fields = GateFields.model_validate(raw)
    except ValidationError as error:
        problems.extend(problems_from_schema(error, shown_path(path)))
        raise_all(shown_path(path), problems)
        raise  # not reached: the schema's errors are problems
    stored: dict[str, str] = {}
    with gathering(problems):
        stored = columns(fields.adapters, shown_path(path))
    if fields.top_k_lora is not None and fields.top_k_lora > len(fields.adapters):
        problems.append(_bad_top_k(fields, shown_path(path)))
    raise_all(shown_path(path), problems)
    return GateFolder(folder, layout, fields, stored, _notes(fields, stored, layout))


def columns(adapters: Mapping[str, str] | list[str], where: str) -> dict[str, str]:
    """Key -> stored path in gate column order.

    A list is in order already. JSON sorts the keys of a dict as text (0, 1, 10, 2), so keys that are one prefix and a
    number go back to numeric order, which is the order of training; other names stay as they are stored.
    """
    if isinstance(adapters, list):
        if len(set(adapters)) != len(adapters):
            raise ExportError("field 'adapters' names an expert twice", where=where, code="E_CONFIG")
        return {name: name for name in adapters}
    parts = [re.fullmatch(r"(.*?)([0-9]{1,9})", key, re.DOTALL) for key in adapters]
    numbers = {key: int(part[2]) for key, part in zip(adapters, parts, strict=True) if part}
    prefixes = {part[1] for part in parts if part}
    if len(numbers) != len(adapters) or len(prefixes) != 1:
        return dict(adapters)
    if len(set(numbers.values())) != len(numbers):
        raise ExportError("two keys of 'adapters' are the same number", where=where, got=shown(list(adapters)))
    return {key: adapters[key] for key in sorted(adapters, key=lambda key: numbers[key])}


def topk_rule(gate: GateFolder, asked: TopkSoftmax | None) -> TopkSoftmax:
    """Over what the top-k softmax runs: as asked, else as the PEFT version that wrote the checkpoint did."""
    if not gate.fields.enable_softmax_topk:
        if asked is not None:
            raise ExportError(
                "takes no softmax over its top k", where=shown_path(gate.folder), fix="leave --topk-softmax out",
                code="E_TOPK",
            )  # fmt: skip
        return TopkSoftmax.TOKEN
    if asked is not None:
        return asked
    version = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", gate.fields.peft_version or "")
    written = (int(version[1]), int(version[2])) if version else None
    is_early_build = written == FIRST_TOKENWISE and "dev" in (gate.fields.peft_version or "")
    if gate.layout is Layout.ORIGINAL or written is None or is_early_build:
        raise ExportError(
            "has enable_softmax_topk, but not by which rule it was trained",
            where=shown_path(gate.folder), got=f"peft_version {shown(gate.fields.peft_version)}",
            need="a PEFT version, or the rule",
            fix="give --topk-softmax token (PEFT 0.18 and later) or flattened (before, and the original library)",
            code="E_TOPK",
        )  # fmt: skip
    return TopkSoftmax.TOKEN if written >= FIRST_TOKENWISE else TopkSoftmax.FLATTENED


def _refused_fields(raw: Mapping[str, Any], layout: Layout, where: str) -> list[InputError]:
    """Fields that change the maths and fields nobody told us of; unset ones change nothing."""
    ignored = _PEFT_ONLY_IGNORED if layout is Layout.PEFT else _ORIGINAL_ONLY_IGNORED
    original_only = {"use_bias", "enable_relu_and_dropout", "base_model_id"}
    known = set(GateFields.model_fields) - (original_only if layout is Layout.PEFT else {"peft_version"})
    problems: list[InputError] = []
    for field, value in raw.items():
        if value and field not in known and field not in ignored:
            reason = _REFUSED.get(field, "this field is not known here")
            what = f"{shown(field)} = {shown(value)} cannot be exported: {reason}"
            problems.append(ExportError(what, where=where, code="E_UNSUPPORTED"))
    return problems


def _bad_top_k(fields: GateFields, where: str) -> ExportError:
    return ExportError(
        "field 'top_k_lora' is larger than the number of experts", where=where, got=str(fields.top_k_lora),
        need=f"1 to {len(fields.adapters)}", code="E_CONFIG",
    )  # fmt: skip


def _notes(fields: GateFields, stored: Mapping[str, str], layout: Layout) -> tuple[str, ...]:
    notes = []
    if list(stored) != list(fields.adapters):
        notes.append(f"gate columns follow the numbers of the keys ({', '.join(stored)}), not their order in the file")
    if fields.use_trainable_adapters and layout is Layout.PEFT:
        notes.append(
            "use_trainable_adapters is set, but PEFT does not save the experts it trained with the gate; "
            "they are read from the stored folders, as PEFT itself does"
        )
    return tuple(notes)
