"""The base model as its config says: built on the meta device, so its modules are known without its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoints.base_folder import folder_of, weight_files
from exporter.checkpoints.sentence import SentenceSettings, read_sentence
from exporter.checkpoints.task import ENCODERS, model_class, model_options, task_of
from exporter.checkpoints.tying import Tying, read_tying
from exporter.checkpoints.weights_file import FLOAT_DTYPES, open_weights
from exporter.errors import ExportError
from runtime.adapter_folder.files import shown_path
from runtime.adapter_folder.json_files import read_json
from runtime.adapter_folder.problems import gathering, shortened, shown
from runtime.errors import InputError, raise_all
from runtime.manifest import Task

# A config that asks for more would take minutes or gigabytes just to describe.
MAX_BLOCKS, MAX_WIDTH, MAX_MODULES = 512, 1 << 22, 200_000
_SIZE_FIELDS = ("hidden_size", "intermediate_size", "vocab_size", "n_embd", "head_dim", "max_position_embeddings")
_COUNT_FIELDS = ("num_hidden_layers", "n_layer", "num_attention_heads", "num_key_value_heads", "num_local_experts")


class ModuleKind(StrEnum):
    """What a module of the base computes, as far as a LoRA cares. GPT-2's Conv1D is a Linear stored transposed."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONV1D = "conv1d"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """A module and its sizes: in and out features; vocabulary and width of an embedding; 0 for other kinds."""

    kind: ModuleKind
    in_features: int
    out_features: int
    type_name: str


@dataclass(frozen=True, slots=True)
class BaseDescription:
    """A checked base model before its weights are read. `modules` is in module-tree order, containers left out."""

    reference: str
    name: str  # as the user or the configs name it; a folder's basename
    folder: Path
    config: Any  # transformers.PreTrainedConfig
    model_type: str
    modules: Mapping[str, ModuleInfo]
    shapes: Mapping[str, tuple[int, ...]]  # of all parameters; a tied one under both its names
    tying: Tying | None  # None: no embedding that the model names
    gate_width: int  # of the hidden states that the gate reads, which are what the head reads: OPT may project them
    files: tuple[Path, ...]  # safetensors, sorted
    stored_names: Mapping[str, str] = field(default_factory=dict)  # our name -> the files', where those differ
    notes: tuple[str, ...] = ()
    task: Task = Task.TEXT_GENERATION
    options: Mapping[str, Any] = field(default_factory=dict)  # of the model's constructor
    sentence: SentenceSettings | None = None  # of a sentence-transformers folder

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.config.get_text_config()

    @property
    def tied_embeddings(self) -> bool:
        """Whether embedding and head are one parameter once transformers has loaded the files."""
        return self.tying is not None and self.tying.by_loader

    @property
    def hidden_size(self) -> int:
        """The width of the blocks."""
        return int(self.text_config.hidden_size)


def describe_base(reference: str, task: Task | None = None) -> BaseDescription:
    """Describe a base by its config and the headers of its weight files; refuses what we never could load.

    `task` overrides what the config's architecture says.
    """
    folder = folder_of(reference)
    notes: list[str] = []
    config = _read_config(folder, notes)
    task = task_of(read_json(folder / "config.json"), folder, task)
    files = weight_files(folder)
    options = model_options(task, config.model_type, _stored_keys(files))
    model = meta_model(config, folder, task, options)
    modules = {path: module_info(module) for path, module in model.named_modules() if path and is_leaf(module)}
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    stored_names = _check_headers(files, shapes, folder, _renaming(model))
    head = model.get_output_embeddings()
    tying = read_tying(model, files, stored_names)
    if tying is not None and tying.by_config and not tying.by_loader:
        notes.append(_two_weights(tying))
    return BaseDescription(
        reference=reference,
        name=folder.resolve().name if Path(reference).is_dir() else reference,
        folder=folder,
        config=config,
        model_type=config.model_type,
        modules=modules,
        shapes=shapes,
        tying=tying,
        gate_width=int(config.get_text_config().hidden_size if head is None else head.weight.shape[1]),
        files=files,
        stored_names=stored_names,
        notes=tuple(notes),
        task=task,
        options=options,
        sentence=read_sentence(folder) if task is Task.FEATURE_EXTRACTION else None,
    )


def _two_weights(tying: Tying) -> str:
    return (
        f"config.json says that {tying.embedding} and {tying.head} are one weight, but the files hold two that differ: "
        "both are kept, as transformers does"
    )


def module_info(module: torch.nn.Module) -> ModuleInfo:
    """The kind and sizes of a module."""
    name = type(module).__name__
    if isinstance(module, torch.nn.Linear):
        return ModuleInfo(ModuleKind.LINEAR, module.in_features, module.out_features, name)
    if isinstance(module, torch.nn.Embedding) and _takes_ids_alone(module):
        return ModuleInfo(ModuleKind.EMBEDDING, module.num_embeddings, module.embedding_dim, name)
    if name == "Conv1D" and type(module).__module__.startswith("transformers."):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return ModuleInfo(ModuleKind.CONV1D, int(rows), int(columns), name)
    return ModuleInfo(ModuleKind.OTHER, 0, 0, name)


def _takes_ids_alone(module: torch.nn.Module) -> bool:
    """Whether the module is called with ids only; OPT's positions, an Embedding too, come with a mask and an offset."""
    return len(inspect.signature(module.forward).parameters) == 1


def is_leaf(module: torch.nn.Module) -> bool:
    """Whether a module has no children; ModuleLists and blocks are no targets."""
    return next(module.children(), None) is None


def _read_config(folder: Path, notes: list[str]) -> Any:
    """The transformers config, from our own reading of config.json; code named in it is never run."""
    from transformers import AutoConfig

    path = folder / "config.json"
    raw = read_json(path)
    _check_raw(raw, path, notes)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the config classes raise anything on bad values
        raise _bad_config(path, f"{type(error).__name__}: {str(error)[:300]}") from error


def _check_raw(raw: dict[str, Any], path: Path, notes: list[str]) -> None:
    """Refuse quantised bases, model types transformers does not have, and absurd sizes; all at once."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where, problems = shown_path(path), list[InputError]()
    model_type = raw.get("model_type")
    is_known = isinstance(model_type, str) and model_type in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *ENCODERS}
    if not is_known:
        what = "needs code from its own repository, which is never run" if raw.get("auto_map") else "is not known"
        problems.append(
            ExportError(
                f"model_type {shown(model_type)} {what}",
                where=where,
                need=f"a causal language model that transformers itself has, or an encoder: {', '.join(ENCODERS)}",
                code="E_BASE",
            )
        )
    elif raw.get("auto_map"):
        notes.append(f"auto_map in {path.name} is ignored: transformers has {model_type} itself")
    if raw.get("quantization_config"):
        problems.append(
            ExportError(
                "the base is quantised",
                where=where,
                got=shown(raw["quantization_config"]),
                fix="give the unquantised base the adapters were trained for",
                code="E_BASE",
            )
        )
    limits = dict.fromkeys(_SIZE_FIELDS, MAX_WIDTH) | dict.fromkeys(_COUNT_FIELDS, MAX_BLOCKS)
    for name, most in limits.items():
        if not _is_within(raw.get(name), most):
            problems.append(
                ExportError(f"field {name} is refused", where=where, got=shown(raw[name]), need=f"0 to {most}")
            )
    raise_all(where, problems)


def _is_within(value: Any, most: int) -> bool:
    """Whether a size asks for no absurd model: left out, 0 (no experts), or one for each block (Gemma 3n)."""
    if isinstance(value, list):
        return 0 < len(value) <= MAX_BLOCKS and all(type(each) is int and 0 <= each <= most for each in value)
    return value is None or (type(value) is int and 0 <= value <= most)


def _stored_keys(files: tuple[Path, ...]) -> frozenset[str]:
    """The names of all tensors in the files."""
    keys: set[str] = set()
    for path in files:
        with open_weights(path) as file:
            keys |= set(file.entries)
    return frozenset(keys)


def meta_model(config: Any, folder: Path, task: Task, options: Mapping[str, Any]) -> Any:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return model_class(task).from_config(config, trust_remote_code=False, **options)
    except Exception as error:  # model constructors raise anything on bad sizes
        raise _bad_config(folder / "config.json", f"{type(error).__name__}: {str(error)[:300]}") from error


def _bad_config(path: Path, got: str) -> ExportError:
    return ExportError(
        "transformers cannot make a model of this config", where=shown_path(path), got=got, code="E_BASE"
    )


def _renaming(model: Any) -> Callable[[str], str]:
    """What transformers calls a stored tensor once it is loaded: GPT-NeoX's files say embed_out, its model lm_head."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]

    def renamed(key: str) -> str:
        for renaming in renamings:
            key = renaming.rename_source_key(key)[0]
        return key

    return renamed


def _check_headers(
    files: tuple[Path, ...], shapes: Mapping[str, tuple[int, ...]], folder: Path, renamed: Callable[[str], str]
) -> dict[str, str]:
    """Every file is sound, every tensor a float, and those with a name of the model have its shape.

    Other names are left to `load_base`: transformers renames and splits keys of some models. Returns our name -> the
    file's for those that are renamed only.
    """
    problems: list[InputError] = []
    stored_names: dict[str, str] = {}
    for path in files:
        with gathering(problems), open_weights(path) as file:
            for stored, entry in file.entries.items():
                key = renamed(stored)
                if key != stored and key in shapes:
                    stored_names[key] = stored
                if entry.dtype not in FLOAT_DTYPES and key in shapes:
                    what = f"tensor {shown(key)} is {entry.dtype}: quantised bases are not supported"
                    problems.append(ExportError(what, where=shown_path(path), code="E_BASE"))
                elif shapes.get(key, entry.shape) != entry.shape:
                    problems.append(
                        ExportError(
                            f"tensor {shown(key)} does not fit config.json",
                            where=shown_path(path),
                            got=str(list(entry.shape)),
                            need=str(list(shapes[key])),
                            code="E_BASE",
                        )
                    )
    raise_all(shown_path(folder), shortened(problems))
    return stored_names
