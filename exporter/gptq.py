"""GPTQ (Frantar et al., 2022): round a matrix input by input, the inputs that follow making up for each error.

Of our own: `gptq` of onnxruntime 1.31.1's quantizer gives the same numbers whatever the Hessian (docs/quantization.md).
"""

from __future__ import annotations

import torch

from exporter.block_rounding import Rounded, round_blocks
from runtime.quantization import QuantizationInfo

DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper


def round_by_gptq(weight: torch.Tensor, hessian: torch.Tensor, info: QuantizationInfo) -> Rounded:
    """`weight` [in, out]; `hessian` [in, in] = sum of x xT over what the module read, fp64, times any factor.

    A block's scale is set when its first input's turn comes, from what its weights are by then.
    """
    left, inverse = weight.double().clone(), _inverse_factor(hessian)
    parts: list[Rounded] = []
    for start in range(0, len(left), info.block):
        block = slice(start, start + info.block)
        grid = round_blocks(left[block], info)
        scale, zero = grid.scale[0].double(), 0.0 if grid.zero is None else grid.zero[0].double()
        half = 1 << (info.weights.bits - 1)
        low, high = (-half, half - 1) if info.symmetric else (0, 2 * half - 1)
        q = torch.empty_like(left[block])
        for row in range(start, start + info.block):
            q[row - start] = ((left[row] / scale).round() + zero).clamp(low, high)
            error = (left[row] - (q[row - start] - zero) * scale) / inverse[row, row]
            left[row + 1 :] -= torch.outer(inverse[row, row + 1 :], error)
        parts.append(Rounded(q.to(grid.q.dtype), grid.scale, grid.zero))
    zeros = [part.zero for part in parts if part.zero is not None]
    return Rounded(
        torch.cat([part.q for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; inputs that were never seen cost nothing."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
