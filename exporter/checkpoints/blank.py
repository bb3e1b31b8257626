"""A base model without its weights: every parameter is reserved memory that nobody touches, and known by its file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exporter.checkpoints.base import BaseDescription
from exporter.checkpoints.load import as_loaded, loading
from exporter.checkpoints.task import model_class
from exporter.checkpoints.weights_file import FLOAT_DTYPES, open_weights
from runtime.adapter_folder.files import is_file


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A float tensor of the base's files."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte of the file

    def read(self) -> torch.Tensor:
        """A copy, in the file's dtype."""
        with open_weights(self.path) as file:
            return file.read(self.key)


@dataclass(frozen=True, slots=True)
class BlankBase:
    """A model whose parameters have shapes and dtype but no values; `stored`: where the files hold each of them."""

    model: Any  # transformers.PreTrainedModel
    stored: Mapping[str, StoredTensor]  # by parameter name; a tied one under its first
    first_names: Mapping[str, str] = field(default_factory=dict)  # other name of a tied parameter -> its first

    def read(self, name: str) -> torch.Tensor:
        """A parameter's values in fp32, under any of its names."""
        return self.stored[self.first_names.get(name, name)].read().float()


def load_blank(base: BaseDescription, dtype: torch.dtype) -> BlankBase | None:
    """The base with nothing of its parameters in memory; None where one is not a tensor of the files as it is.

    Untouched memory costs none: the kernel gives pages when they are written. Buffers have their values; those a
    checkpoint stores are rounded to `dtype`, those the model computes stay as it computes them (`round_model`).
    Raises ExportError as `load_base` does, but for values, which nobody has seen.
    """
    tensors = stored_tensors(base)
    if _is_converted(base, tensors) or _may_be_untied(base, tensors):
        return None
    blanks = {key: torch.empty(tensor.shape, dtype=torch.float32) for key, tensor in tensors.items()}
    model = _loaded(base, blanks)
    keys = {(blank.data_ptr(), blank.shape): key for key, blank in blanks.items() if blank.numel()}
    first_names = _first_names(model)
    stored = {}
    for name, parameter in model.named_parameters():
        key = keys.get((parameter.data_ptr(), parameter.shape))
        if key is None:
            return None
        stored[name] = tensors[key]
        parameter.data = torch.empty(parameter.shape, dtype=dtype)
    for name in sorted(model.state_dict().keys() & {name for name, _ in model.named_buffers()}):
        path, _, leaf = name.rpartition(".")
        value = tensors[base.stored_names.get(name, name)].read()
        setattr(model.get_submodule(path), leaf, value.to(dtype))
    return BlankBase(model, stored, first_names)


def stored_tensors(base: BaseDescription) -> dict[str, StoredTensor]:
    """All float tensors of the base's files by key."""
    found = {}
    for path in base.files:
        with open_weights(path) as file:
            for key, entry in file.entries.items():
                if entry.dtype in FLOAT_DTYPES:
                    found[key] = StoredTensor(path, key, FLOAT_DTYPES[entry.dtype], entry.shape, entry.start)
    return found


def _first_names(model: Any) -> dict[str, str]:
    """Every further name of a parameter that has several -> its first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def _is_converted(base: BaseDescription, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether transformers makes some parameters of other tensors, as Mixtral's block experts: that needs values."""
    names = {base.stored_names.get(name, name) for name in base.shapes}
    return bool(names - tensors.keys() and tensors.keys() - names)


def _may_be_untied(base: BaseDescription, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the files hold both of two weights that are one by the config: transformers then compares the values."""
    tied = getattr(_class(base), "_tied_weights_keys", None) or {}
    is_stored = [all(any(re.search(name, key) for key in tensors) for name in pair) for pair in tied.items()]
    return base.tying is not None and base.tying.by_config and any(is_stored)


def _class(base: BaseDescription) -> Any:
    """The concrete class behind transformers' Auto class."""
    known = model_class(base.task)._model_mapping[type(base.config)]
    return known[0] if isinstance(known, tuple) else known


def _loaded(base: BaseDescription, blanks: Mapping[str, torch.Tensor]) -> Any:
    """transformers' own loader on `blanks`: it takes tensors of the right dtype as they are, and ties what is tied."""
    from transformers import GenerationConfig

    with loading(base):
        model, info = _class(base).from_pretrained(
            None, config=base.config, state_dict=dict(blanks), dtype=torch.float32, output_loading_info=True,
            **base.options,
        )  # fmt: skip
        if model.can_generate():  # as transformers' `adjust_generation_fn`: old models keep settings in config.json
            has_own = is_file(base.folder / "generation_config.json")
            old = {} if has_own else {"config_file_name": "config.json", "_from_model_config": True}
            model.generation_config = GenerationConfig.from_pretrained(base.folder, local_files_only=True, **old)
    return as_loaded(model, info, base)
