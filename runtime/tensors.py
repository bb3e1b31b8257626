"""What sessions share about the tensors of a step: dtypes, sizes against the signature, and finite numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, NumericError
from runtime.rows import Rows
from runtime.signature import LOGITS, Signature, TensorSpec

Array = NDArray[Any]

# dtype name -> how numpy holds it; numpy has no bfloat16, its bits travel as uint16
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "int64": np.dtype(np.int64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
Tensors = Sequence[tuple[str, str, Sequence[Any]]]  # name, dtype name, shape


def shape_of(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape with its symbols filled in."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def float32_copy(array: Array) -> NDArray[np.float32]:
    """A copy in float32; uint16 holds the bits of bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def is_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(np.isfinite(float32_copy(array) if array.dtype == np.uint16 else array).all())


def first_bad(results: Mapping[str, Array], rows: Rows, fresh: Sequence[Array] = ()) -> NumericError | None:
    """The first tensor with NaN or infinity at a real token, and the rows it concerns; `fresh`: K/V [N, B, H, S, D]."""
    real = np.arange(rows.tokens.shape[1]) < rows.counts[:, None]  # [B, S]
    tensors = [(LOGITS, results[LOGITS], np.take_along_axis(real, rows.logit_index, axis=1))]
    tensors += [(name, array, real) for name, array in results.items() if name != LOGITS]
    tensors += [("K/V", array.transpose(1, 3, 0, 2, 4), real) for array in fresh]  # [B, S, N, H, D]
    for name, array, counted in tensors:
        bad = [row for row in range(len(array)) if not is_finite(array[row][counted[row]])]
        if bad:
            return NumericError(name, tuple(bad))
    return None


def check_signature(signature: Signature, inputs: Tensors, outputs: Tensors, where: str) -> None:
    """Refuse a graph or engine whose inputs and outputs are not exactly the signature's."""
    differences = [
        f"{side} {name}: signature {want.get(name, 'none')}, graph {have.get(name, 'none')}"
        for side, specs, tensors in (("input", signature.inputs, inputs), ("output", signature.outputs, outputs))
        for want, have in [(_wanted(specs), _had(tensors, specs))]
        for name in want | have
        if want.get(name) != have.get(name)
    ]
    if differences:
        raise InputError("the graph is not the one its signature describes", where=where, got="; ".join(differences))


def _wanted(specs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """Name -> dtype and shape, free sizes as "?"."""
    return {
        spec.name: f"{spec.dtype}{[size if isinstance(size, int) else '?' for size in spec.shape]}" for spec in specs
    }


def _had(tensors: Tensors, specs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """The same for what is loaded, whose shapes may know more or less than the signature's symbols."""
    known = {spec.name: spec.shape for spec in specs}
    return {name: f"{dtype}{_sizes(shape, known.get(name, ()))}" for name, dtype, shape in tensors}


def _sizes(shape: Sequence[Any], wanted: tuple[int | str, ...]) -> list[int | str]:
    """Sizes where a symbol on either side matches anything but another rank; TensorRT writes a symbol as -1."""
    free = [not isinstance(size, int) or size < 0 for size in shape]
    if len(shape) != len(wanted):
        return ["?" if is_free else size for size, is_free in zip(shape, free, strict=True)]
    return [
        "?" if isinstance(want, str) else want if is_free else size
        for size, is_free, want in zip(shape, free, wanted, strict=True)
    ]
