"""The oracle of quantised graphs: the Hugging Face model with the weights that a graph stores, dequantised in torch.

It reads the integers from the graph's file, so an export bug cannot hide behind quantisation loss (stage C1), and
`steps_off` holds them to the weights they stand for, by a way that shares nothing with `block_rounding`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from exporter.adapters import AdapterSet
from exporter.reference import Reference
from runtime.quantization import ActivationType, QuantizationInfo, WeightType


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One module's weight as the graph has it, lying as the module's parameter does; scale is that of every entry."""

    value: torch.Tensor
    scale: torch.Tensor


class QuantizedLinear(nn.Linear):
    """A Linear whose product reads `stored`; `weight` stays what it was, for DoRA's norms are of that."""

    def __init__(self, base: nn.Linear, stored: torch.Tensor, block: int | None) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight, base.bias
        self.stored = nn.Parameter(stored, requires_grad=False)
        self.block = block  # of activations that are rounded, too

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(rounded_activations(x, self.block), self.stored, self.bias)


class QuantizedConv1D(Conv1D):
    """The same for GPT-2's, whose weight is [in, out]."""

    def __init__(self, base: Conv1D, stored: torch.Tensor, block: int | None) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.nf = base.weight, base.bias, base.nf
        self.stored = nn.Parameter(stored, requires_grad=False)
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rounded_activations(x, self.block) @ self.stored + self.bias


def rounded_activations(x: torch.Tensor, block: int | None) -> torch.Tensor:
    """x [.., in] as MatMulNBits of accuracy level 4 sees it: int8 times the largest |x| / 127 of each block."""
    if block is None:
        return x
    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / torch.where(scale > 0, scale, 1.0)).round() * scale).flatten(-2)


def stored_weights(graph: Path, model: PreTrainedModel, info: QuantizationInfo) -> dict[str, StoredWeight]:
    """Path -> the weight that this graph holds for it, of all modules it has quantised."""
    loaded = ir.load(graph).graph.initializers
    arrays = {name: value.const_value for name, value in loaded.items() if value.const_value is not None}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embedding = model.get_input_embeddings()
    found = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            continue
        kind, tail = (WeightType.INT8, ("",)) if module is embedding else (info.weights, (".T", ""))
        for name in [f"{stem}{t}.{kind}" for stem in (f"{path}.weight", names[id(weight)]) for t in tail]:
            if name in arrays:
                found[path] = _stored(arrays, name, info.block, axis=1 if module is embedding else 0)
                break
    return found


def _stored(arrays: Mapping[str, ir.TensorProtocol], name: str, block: int, axis: int) -> StoredWeight:
    q, scale = (arrays[each].numpy().astype(np.float32) for each in (name, f"{name}_scale"))
    zero = arrays[f"{name}_zero"].numpy().astype(np.float32) if f"{name}_zero" in arrays else np.zeros_like(scale)
    scale, zero = (np.repeat(each, block, axis) for each in (scale, zero))
    pair = (torch.from_numpy((q - zero) * scale), torch.from_numpy(scale))
    return StoredWeight(*(each.T for each in pair)) if name.rpartition(".")[0].endswith(".T") else StoredWeight(*pair)


def quantized_model(
    model: PreTrainedModel, stored: Mapping[str, StoredWeight], info: QuantizationInfo
) -> PreTrainedModel:
    """A copy that computes with the stored weights; all others are the model's own, in the same memory."""
    shared = {id(each): each for each in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    block = info.block if info.activations is ActivationType.INT8 else None
    for path, weight in stored.items():
        module = copied.get_submodule(path)
        if isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(weight.value, requires_grad=False)
            continue
        kind = QuantizedConv1D if isinstance(module, Conv1D) else QuantizedLinear
        copied.set_submodule(path, kind(module, weight.value.contiguous(), block))
    return copied


def quantized_reference(
    reference: Reference, stored: Mapping[str, StoredWeight], info: QuantizationInfo, adapters: AdapterSet
) -> Reference:
    """The same oracle on the stored weights, with these adapters."""
    made = copy.copy(reference)
    made.model = quantized_model(reference.model, stored, info)
    made.experts = adapters.experts
    return made


def without_folded(adapters: AdapterSet, stored: Mapping[str, StoredWeight]) -> AdapterSet:
    """The experts without their updates of quantised modules: in a static graph those are in the stored weights."""
    experts = [
        replace(expert, deltas={path: delta for path, delta in expert.deltas.items() if path not in stored})
        for expert in adapters.experts
    ]
    return replace(adapters, experts=tuple(experts))


def steps_off(stored: Mapping[str, StoredWeight], wanted: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    """Path -> how far its worst weight lies from the one it stands for, in steps (scales): 0.5 is rounding."""
    for path, weight in stored.items():
        yield path, float(((weight.value - wanted[path].float()).abs() / weight.scale).max())
