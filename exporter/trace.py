"""torch -> onnx_ir: one decoder step traced with every dimension of the signature left dynamic."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch

from exporter.dynamic import TracedModel
from exporter.encoder import TracedEncoder
from runtime.adapter_inputs import RANK, adapter_inputs
from runtime.signature import (
    CACHE_LENGTHS,
    INPUT_IDS,
    LENGTHS,
    LOGIT_INDEX,
    POSITION_IDS,
    ROUTER,
    SCALINGS,
    TOKEN_TYPE_IDS,
    Signature,
    TensorSpec,
)

# Sizes for tracing: none is 0 or 1 (torch.export specialises those away) and no two are equal.
EXAMPLE_SIZES = {"B": 2, "S": 3, "C": 7, "K": 5, RANK: 11}


def trace(model: TracedModel | TracedEncoder, signature: Signature, opset: int) -> ir.Model:
    """Export one step as plain ONNX operators of `opset`; inputs and outputs are named by the signature."""
    inputs = example_inputs(signature)
    shapes = _dynamic_shapes(signature)
    with torch.no_grad(), _quiet():
        # Runtime asserts instead of guards: views of grouped heads otherwise constrain S.
        program = torch.export.export(
            model, (), inputs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
        onnx_program = torch.onnx.export(
            program,
            kwargs=inputs,
            dynamo=True,
            opset_version=opset,
            optimize=False,  # the default folds weight transposes into copies of the weights
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert onnx_program is not None
    return onnx_program.model


def example_inputs(signature: Signature) -> dict[str, Any]:
    """Tensors of the example sizes for `TracedModel.forward`; absent inputs are left out."""
    tensors = {spec.name: _example(spec) for spec in signature.inputs}
    if CACHE_LENGTHS in tensors:
        tensors[CACHE_LENGTHS] = torch.tensor([EXAMPLE_SIZES["C"] - EXAMPLE_SIZES["S"], 1])
    if LENGTHS in tensors:
        tensors[LENGTHS] = torch.tensor([EXAMPLE_SIZES["S"], 1])
        tensors |= {name: torch.zeros_like(tensors[name]) for name in (TOKEN_TYPE_IDS,) if name in tensors}
    return _as_arguments(signature, tensors)


def _as_arguments(signature: Signature, values: dict[str, Any]) -> dict[str, Any]:
    """Values by input name -> the arguments of `TracedModel.forward`, or of `TracedEncoder.forward`.

    Absent ones are left out: beside None or an empty list torch's exporter loses the names of all dimensions.
    """
    if signature.input(LENGTHS) is not None:
        return {name: values[name] for name in (INPUT_IDS, TOKEN_TYPE_IDS, LENGTHS, SCALINGS) if name in values}
    named = (INPUT_IDS, POSITION_IDS, CACHE_LENGTHS, SCALINGS, ROUTER, LOGIT_INDEX)
    past = [values[carry.input] for carry in signature.carries]
    lists = {"past": past, "adapters": [values[spec.name] for spec in adapter_inputs(signature)]}
    return {name: values[name] for name in named if name in values} | {
        name: some for name, some in lists.items() if some
    }


def _example(spec: TensorSpec) -> torch.Tensor:
    shape = [EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in spec.shape]
    if spec.dtype == "int64":
        return torch.arange(shape[-1]).expand(shape).clone() % EXAMPLE_SIZES["S"]
    return torch.full(shape, 0.5, dtype=getattr(torch, spec.dtype))


def _dynamic_shapes(signature: Signature) -> dict[str, Any]:
    dims = {name: torch.export.Dim(name) for name in EXAMPLE_SIZES}
    shapes = {
        spec.name: {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in signature.inputs
    }
    return _as_arguments(signature, shapes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about itself (absent torchvision, axis names) away from the user."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
