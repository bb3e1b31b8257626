"""adapter_config.json of one LoRA, DoRA or AdaLoRA: the fields we use, may ignore, refuse by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.adapter_folder.files import shown_path
from runtime.adapter_folder.patterns import TargetRule, check_pattern, is_named, value_for
from runtime.adapter_folder.problems import gathering, problems_from_schema, shown
from runtime.errors import InputError, raise_all
from runtime.manifest import AdapterKind

MAX_RANK = 1024
MAX_ALPHA = 65_536.0

Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(gt=0, le=MAX_ALPHA)]
Name = Annotated[str, Field(max_length=1024)]
Names = Annotated[list[Name], Field(max_length=20_000)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 22)]], Field(max_length=65_536)]
MAX_PATTERNS = 2048

# These change nothing in the forward pass of a saved adapter in evaluation.
IGNORED_FIELDS = frozenset({
    "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "fan_in_fan_out", "revision",
    "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "loftq_config", "corda_config",
    "lora_ga_config",
})  # fmt: skip
# How AdaLoRA was trained, and fields of LoRA that PEFT's AdaLoraLayer never reads.
IGNORED_ADALORA_FIELDS = frozenset({
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "r", "use_rslora",
    "alpha_pattern",
})  # fmt: skip

# Field -> why a set value is refused.
REFUSED_FIELDS = {
    "lora_bias": "a bias on lora_B is added ungated, even at scaling 0",
    "target_parameters": "LoRA on raw parameters (3-D mixture-of-experts weights) has no site here",
    "alora_invocation_tokens": "aLoRA switches on at an invocation token",
    "layer_replication": "it changes the number of blocks of the base",
    "use_qalora": "QALoRA pools the input of lora_A",
    "use_bdlora": "BD-LoRA's blocks are not a plain low-rank product",
    "arrow_config": "Arrow routes by its own prototypes",
    "velora_config": "VeLoRA is not plain LoRA",
    "monteclora_config": "MonteCLoRA samples its weights",
    "kasa_config": "KaSA changes the base weights",
    "megatron_config": "Megatron's parallel layers are not Linear",
}

# Modules that PEFT's ensure_weight_tying looks for among those it saves or adapts (peft EMBEDDING_LAYER_NAMES).
ENDS = ("embed_tokens", "lm_head")
# init_lora_weights that leave the base as it is; the others need the base they modified.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal"})


class AdapterFields(BaseModel):
    """The fields that every kind has: which modules it adapts, and which weights of the base it replaces."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    lora_alpha: Alpha = 8
    modules_to_save: Names | None = None
    trainable_token_indices: Tokens | Annotated[dict[Name, Tokens], Field(max_length=64)] | None = None
    target_modules: Names | Name | None = None
    exclude_modules: Names | Name | None = None
    layers_to_transform: Annotated[list[int], Field(max_length=20_000)] | int | None = None
    layers_pattern: Annotated[list[Name], Field(max_length=64)] | Name | None = None
    base_model_name_or_path: Annotated[str, Field(max_length=4096)] | None = None
    ensure_weight_tying: bool = False

    @property
    def ties_saved(self) -> bool:
        """Whether embedding and head are saved as one weight if the base ties them (peft _check_tied_modules)."""
        return self.ensure_weight_tying and any(name.split(".")[-1] in ENDS for name in self.modules_to_save or ())

    @property
    def ties_loras(self) -> bool:
        """Whether one LoRA adapts embedding and head if the base ties them (peft _check_tied_modules)."""
        if not self.ensure_weight_tying or self.ties_saved or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            return any(is_named(self.target_modules, name) for name in ENDS)
        return any(name.split(".")[-1] in ENDS for name in self.target_modules)

    def target_rule(self) -> TargetRule | None:
        """Which modules the adapter targets; None where the file leaves it to PEFT's defaults."""
        if self.target_modules is None or self.target_modules == "all-linear":
            return None
        blocks = self.layers_to_transform
        return TargetRule(
            targets=_names(self.target_modules),
            excluded=_names(self.exclude_modules or ()),
            blocks=(blocks,) if isinstance(blocks, int) else tuple(blocks or ()),
            block_patterns=_as_list(self.layers_pattern),
        )


class LoraFields(AdapterFields):
    """LoRA, rsLoRA and DoRA."""

    ignored: ClassVar = IGNORED_FIELDS
    refused: ClassVar = REFUSED_FIELDS

    r: Rank = 8
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Annotated[dict[Name, Rank], Field(max_length=MAX_PATTERNS)] | None = None
    alpha_pattern: Annotated[dict[Name, Alpha], Field(max_length=MAX_PATTERNS)] | None = None

    @property
    def kind(self) -> AdapterKind:
        """DoRA is a LoRA with magnitudes."""
        return AdapterKind.DORA if self.use_dora else AdapterKind.LORA

    def rank_of(self, path: str) -> int:
        """The rank of this module, after rank_pattern."""
        return value_for(self.rank_pattern or {}, path, self.r)

    def scale_of(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, after both patterns (peft LoraLayer.update_layer)."""
        rank = self.rank_of(path)
        alpha = value_for(self.alpha_pattern or {}, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class AdaLoraFields(AdapterFields):
    """AdaLoRA: `rank_pattern` tells which of the init_r ranks of a module were kept."""

    ignored: ClassVar = IGNORED_FIELDS | IGNORED_ADALORA_FIELDS
    refused: ClassVar = {**REFUSED_FIELDS, "use_dora": "PEFT has no DoRA for AdaLoRA"}
    kind: ClassVar = AdapterKind.ADALORA

    init_r: Rank = 12
    rank_pattern: Annotated[dict[Name, list[bool]], Field(max_length=20_000)] | None = None

    def rank_of(self, path: str) -> int:
        """How many ranks of this module are kept; may be 0."""
        return sum((self.rank_pattern or {}).get(f"{path}.lora_E", [True] * self.init_r))

    def scale_of(self, _: str) -> float:
        """PEFT divides by init_r, however few ranks were kept (peft SVDLinear.get_delta_weight)."""
        return self.lora_alpha / (self.init_r + 1e-5)


def parse_lora_config(raw: dict[str, Any], path: Path) -> LoraFields | AdaLoraFields:
    """The checked fields of adapter_config.json; all that is wrong with it is raised at once."""
    where = shown_path(path)
    schema = AdaLoraFields if raw.get("peft_type") == "ADALORA" else LoraFields
    if schema is LoraFields:
        require_peft_type(raw, "LORA", where)
    problems: list[InputError] = refused_fields(raw, schema, where)
    try:
        fields = schema.model_validate(raw)
    except ValidationError as error:
        problems.extend(problems_from_schema(error, where))
    else:
        for pattern, field in _patterns(fields):
            with gathering(problems):
                check_pattern(pattern, field, where)
        if isinstance(fields, AdaLoraFields):
            problems.extend(_rank_problems(fields, where))
    raise_all(where, problems)
    return fields


def require_peft_type(raw: dict[str, Any], wanted: str, where: str) -> None:
    """Refuse any adapter kind but `wanted`."""
    kind = raw.get("peft_type")
    if kind != wanted:
        raise InputError(
            "is not the adapter kind needed here", where=where, got=f"peft_type {shown(kind)}",
            need=f"peft_type '{wanted}'", fix="give a LoRA, DoRA or AdaLoRA folder for each expert", code="E_KIND",
        )  # fmt: skip


def refused_fields(raw: dict[str, Any], schema: type[LoraFields] | type[AdaLoraFields], where: str) -> list[InputError]:
    """One problem for each field whose value we cannot represent."""
    problems: list[InputError] = []
    for field, reason in schema.refused.items():
        if raw.get(field):
            problems.append(_unsupported(where, f"{field} = {shown(raw[field])}", reason))
    if raw.get("bias", "none") != "none":
        problems.append(_unsupported(where, f"bias = {shown(raw['bias'])}", "trained biases replace those of the base"))
    init = raw.get("init_lora_weights", True)
    if not (isinstance(init, bool) or (isinstance(init, str) and init in PLAIN_INITS)):
        reason = "PEFT changes the base weights by it on every load; convert it when saving (path_initial_model_...)"
        problems.append(_unsupported(where, f"init_lora_weights = {shown(init)}", reason))
    known = {*schema.ignored, *schema.refused, *schema.model_fields, "bias", "init_lora_weights", "peft_type"}
    # A newer PEFT adds fields; unset, they change nothing. The exact set of tensors is checked anyway.
    for field in (field for field in raw if field not in known and raw[field]):
        problems.append(_unsupported(where, f"{shown(field)} = {shown(raw[field])}", "this field is not known here"))
    return problems


def _rank_problems(fields: AdaLoraFields, where: str) -> Iterator[InputError]:
    """AdaLoRA's rank_pattern has one entry for each of the init_r ranks a module began with."""
    for name, kept in (fields.rank_pattern or {}).items():
        if len(kept) != fields.init_r:
            yield InputError(
                f"rank_pattern of {shown(name)} does not fit init_r", where=where, got=f"{len(kept)} entries",
                need=f"{fields.init_r}, one for each rank of the start", fix="save the adapter again", code="E_CONFIG",
            )  # fmt: skip


def _unsupported(where: str, what: str, reason: str) -> InputError:
    return InputError(
        f"{what} cannot be exported: {reason}", where=where, fix="train or convert the adapter without it",
        code="E_UNSUPPORTED",
    )  # fmt: skip


def _patterns(fields: LoraFields | AdaLoraFields) -> list[tuple[str, str]]:
    """Every regular expression of the config and its field. AdaLoRA's rank_pattern has names for keys."""
    found = []
    if isinstance(fields, LoraFields):
        found += [(pattern, "rank_pattern") for pattern in fields.rank_pattern or {}]
        found += [(pattern, "alpha_pattern") for pattern in fields.alpha_pattern or {}]
    found += [(pattern, "layers_pattern") for pattern in _as_list(fields.layers_pattern)]
    for field in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(fields, field), str):
            found.append((value, field))
    return found


def _names(value: str | list[str] | tuple[str, ...]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _as_list(value: str | list[str] | None) -> tuple[str, ...]:
    """PEFT takes one name or a list; an empty one means none."""
    if not value:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)
