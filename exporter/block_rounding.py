"""Block-wise rounding of a matrix to int8 or int4: one scale for `block` inputs of an output.

Symmetric: value = q * scale, q from -8 to 7 (-128 to 127), scale = largest |value| / 7.5 (127.5), never negative:
TensorRT takes neither zero points nor negative scales. Asymmetric: value = (q - zero) * scale with unsigned q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.quantization import QuantizationInfo


@dataclass(frozen=True, slots=True)
class Rounded:
    """q [in, out] int8 or uint8, one element a byte; scale [in / block, out] float32; zero uint8 as scale, or None."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None


def round_blocks(weight: torch.Tensor, info: QuantizationInfo) -> Rounded:
    """Round a matrix [in, out] to nearest; `in` is a multiple of the block."""
    blocks = weight.float().unflatten(0, (-1, info.block))  # [in / block, block, out]
    if not info.symmetric:
        return _round_asymmetric(blocks, info.weights.bits)
    half = 1 << (info.weights.bits - 1)
    scale = _not_zero(blocks.abs().amax(1) / (half - 0.5))
    q = (blocks / scale[:, None]).round().clamp(-half, half - 1)
    return Rounded(q.flatten(0, 1).to(torch.int8), scale)


def _round_asymmetric(blocks: torch.Tensor, bits: int) -> Rounded:
    """0 is always among the values: a weight of 0 stays 0."""
    top = (1 << bits) - 1
    low, high = blocks.amin(1).clamp_max(0), blocks.amax(1).clamp_min(0)
    scale = _not_zero((high - low) / top)
    zero = (-low / scale).round().clamp(0, top)
    q = ((blocks / scale[:, None]).round() + zero[:, None]).clamp(0, top)
    return Rounded(q.flatten(0, 1).to(torch.uint8), scale, zero.to(torch.uint8))


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    """A block of zeros has scale 1."""
    return torch.where(scale > 0, scale, 1.0)


def packed(values: torch.Tensor) -> torch.Tensor:
    """4-bit values, one a byte, as ONNX packs them: two a byte in row-major order, the first in the low half."""
    flat = values.flatten().view(torch.uint8) & 15
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)
