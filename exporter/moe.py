"""Mixture-of-experts blocks of a base (Mixtral), every block expert computed for every token: a graph has no loops.

An experts function registered through transformers' ExpertsInterface, so that no model code is patched. "Block expert"
is one feed-forward network of the base; the LoRA experts of an X-LoRA are something else and never lie here.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from exporter.errors import ExportError

EXPERTS_NAME = "xlora_export"


def dense_experts(
    module: Any,
    hidden: torch.Tensor,  # [T, H]
    top_k_index: torch.Tensor,  # [T, k] i64
    top_k_weights: torch.Tensor,  # [T, k]
) -> torch.Tensor:
    """Sum over the chosen block experts of weight * down(act(gate x) * up x), as [T, H].

    The products are those of all N block experts, N/k times the work of the chosen ones, and T may be anything: a
    gather of the chosen weights would copy k of them for each token. What was not chosen is cut off before `down`, by
    selection and not by a factor of 0: a half-precision overflow there must not become a NaN here.
    """
    _require_plain(module)
    numbers = torch.arange(module.gate_up_proj.shape[0], device=hidden.device)
    is_chosen = top_k_index[..., None] == numbers  # [T, k, N]
    weights = torch.where(is_chosen, top_k_weights[..., None], 0.0).sum(1).transpose(0, 1)[..., None]  # [N, T, 1]
    inner = module._apply_gate(hidden[None] @ module.gate_up_proj.transpose(1, 2))  # [N, T, I]
    inner = torch.where(weights != 0, inner * weights.to(inner.dtype), 0.0)
    return (inner @ module.down_proj.transpose(1, 2)).sum(0)


def _require_plain(module: Any) -> None:
    """Refuse layouts that no family tested here has."""
    odd = [name for name in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(module, name, False)]
    if odd or not getattr(module, "has_gate", True):
        raise ExportError(
            f"{type(module).__name__} has block experts of a form that is not supported",
            where="base",
            got=", ".join(odd) or "no gate projection",
            need="gate_up_proj and down_proj without biases, as Mixtral has them",
            fix="families proved to work are listed in the README",
            code="E_UNSUPPORTED",
        )


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, dense_experts)
