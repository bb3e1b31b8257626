"""One block of each kind is traced, the others are made of it (`InstantiateBlocksPass`): depth costs no tracing.

Blocks are of one kind when their modules, their parameters' shapes and what the store holds of these are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from exporter.passes.instantiate_blocks import MARK_DOMAIN, MARKS, BlockCopies
from runtime.signature import Signature, present_names

OWN = {"layer_idx", "name", "number", "path", "training"}  # what tells blocks of one kind apart
PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A model's blocks, each with the first block of its kind."""

    model: PreTrainedModel
    path: str  # of their list
    named: str  # the same in our names: a classifier's backbone is wrapped while it is traced
    first: tuple[int, ...]  # per block

    @property
    def traced(self) -> tuple[int, ...]:
        """The blocks that stand for all."""
        return tuple(sorted(set(self.first)))

    def copies(self) -> BlockCopies:
        """What the pass needs to know."""
        blocks = _list(self.model, self.path)
        numbers = [
            dict(zip(_numbers(blocks[first]), _numbers(block), strict=True))
            for first, block in zip(self.first, blocks, strict=True)
        ]
        return BlockCopies(self.named, self.first, tuple(numbers))


def find_blocks(model: PreTrainedModel, names: Mapping[str, str], known_of: Callable[[str], Hashable]) -> Blocks | None:
    """The blocks of a model with its gated modules in place; None where no two are of one kind, or they are not a list.

    `names`: a parameter's name in the model -> ours; `known_of`: what has to be alike besides, by our name.
    """
    config = model.config.get_text_config()
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):  # GPT-2: a factor that no attribute shows
        return None
    count = config.num_hidden_layers
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name
    ]
    if not lists:
        return None
    path = min(lists, key=lambda name: (name.count("."), name))
    named = _named(names, path)
    if named is None:
        return None
    holders: defaultdict[int, set[str]] = defaultdict(set)  # parameter -> the blocks that have it, "" for all else
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].add(name.removeprefix(f"{path}.").split(".")[0] if name.startswith(f"{path}.") else "")
    first: list[int] = []
    kinds: dict[Hashable, int] = {}
    types = getattr(config, "layer_types", None)
    for number, block in enumerate(_list(model, path)):
        prefix = f"{path}.{number}."
        ours = [names[prefix + name] for name, _ in block.named_parameters(remove_duplicate=False)]
        is_shared = any(len(holders[id(parameter)]) > 1 for parameter in block.parameters())
        is_apart = is_shared or not all(name.startswith(f"{named}.{number}.") for name in ours)
        kind = (
            number if is_apart else None,
            types[number] if types else None,
            _shape(block),
            tuple(map(known_of, ours)),
        )
        first.append(kinds.setdefault(kind, number))
    return Blocks(model, path, named, tuple(first)) if len(kinds) < len(first) else None


def block_kinds(model: PreTrainedModel) -> tuple[str, list[Hashable]]:
    """The path of a model's list of blocks, and what tells each block's kind; works on the meta device.

    No path and no kinds where its blocks are not one list.
    """
    config = model.config.get_text_config()
    count, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        return "", list(range(count))
    path = min(lists, key=lambda name: (name.count("."), name))
    return path, [(types[i] if types else None, _shape(block)[:2]) for i, block in enumerate(_list(model, path))]


@contextmanager
def only_traced(blocks: Blocks) -> Iterator[None]:
    """Leave one block of each kind in the model, its hidden state marked where it enters and leaves."""
    modules, config = _list(blocks.model, blocks.path), blocks.model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    with ExitStack() as undo:
        for number in blocks.traced:
            handles = (
                modules[number].register_forward_pre_hook(_entry(number), with_kwargs=True),
                modules[number].register_forward_hook(_exit(number)),
            )
            for handle in handles:
                undo.callback(handle.remove)
        if types:
            undo.callback(setattr, config, "layer_types", types)
            config.layer_types = [types[number] for number in blocks.traced]
        everything = dict(modules._modules)
        undo.callback(modules._modules.update, everything)
        undo.callback(modules._modules.clear)
        undo.callback(setattr, modules, "__class__", type(modules))
        modules.__class__ = _Some
        for number in set(range(len(everything))) - set(blocks.traced):
            del modules._modules[str(number)]
        yield


def of_blocks(signature: Signature, copies: BlockCopies) -> Signature:
    """The same with the caches and adapters of the traced blocks only."""
    absent = set(range(len(copies.first))) - set(copies.first)
    dropped = {name for block in absent for name in (*copies.inputs(block, signature), *present_names(block))}
    return Signature(
        tuple(spec for spec in signature.inputs if spec.name not in dropped),
        tuple(spec for spec in signature.outputs if spec.name not in dropped),
        tuple(carry for carry in signature.carries if carry.output not in dropped),
    )


class _Some(nn.ModuleList):
    """Some blocks of a list, under the names they have there."""

    def __getitem__(self, place: Any) -> Any:
        return list(self._modules.values())[place]


def _list(model: nn.Module, path: str) -> nn.ModuleList:
    modules = model.get_submodule(path)
    assert isinstance(modules, nn.ModuleList)
    return modules


def _named(names: Mapping[str, str], path: str) -> str | None:
    """What our names call the list at `path`; None where no parameter tells."""
    first = f"{path}.0."
    for name, ours in names.items():
        rest = f".0.{name.removeprefix(first)}"
        if name.startswith(first) and ours.endswith(rest):
            return ours.removesuffix(rest)
    return None


def _shape(block: nn.Module) -> tuple[Hashable, Hashable, Hashable]:
    modules = tuple(
        (
            name,
            type(module),
            tuple(sorted((key, repr(value)) for key, value in vars(module).items() if _is_plain(key, value))),
        )
        for name, module in block.named_modules(remove_duplicate=False)
    )
    parameters = tuple(
        (name, tuple(parameter.shape), parameter.dtype)
        for name, parameter in block.named_parameters(remove_duplicate=False)
    )
    known = ((name, buffer) for name, buffer in block.named_buffers() if not buffer.is_meta)
    buffers = tuple((name, repr(buffer.tolist())) for name, buffer in known)
    return modules, parameters, buffers


def _is_plain(key: str, value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(each, PLAIN) for each in value)
    return key not in OWN and isinstance(value, PLAIN)


def _numbers(block: nn.Module) -> list[int]:
    """Which parts of the scalings' columns the block's sites read, in the order of its modules."""
    numbers = (getattr(module, "number", None) for module in block.modules())
    return [number for number in numbers if isinstance(number, int)]


def _entry(number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (_mark(inputs[0], "in", number), *inputs[1:]), named
        return inputs, named | {"hidden_states": _mark(named["hidden_states"], "in", number)}

    return hook


def _exit(number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return _mark(output, "out", number)
        return (_mark(output[0], "out", number), *output[1:])

    return hook


def _mark(hidden: torch.Tensor, side: str, number: int) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        f"{MARK_DOMAIN}::{MARKS[side]}", (hidden,), {"block": number}, dtype=hidden.dtype, shape=hidden.shape, version=1
    )
