"""The plugins' operators in a traced graph, as nodes of our domain; `AttachFunctionsPass` adds what they mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exporter.adapters import GateConfig
from exporter.errors import ExportError
from plugins.operators import DOMAIN, GATE_SCALINGS, GATED_LOW_RANK, MAX_EXPERTS, VERSION, GateRules
from runtime.manifest import TopkSoftmax

# How TensorRT finds a plugin; with the namespace it prefers one to a local function of that name (from 10.7 on).
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": VERSION}


def gate_scalings(logits: torch.Tensor, config: GateConfig) -> torch.Tensor:
    """Logits [B, S, G, E] -> scalings [B, S, G, E], as one node."""
    return _node(GATE_SCALINGS, (logits,), rules_of(config).attributes())


def gated_low_rank(
    base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """base [B, S, out] + ((x [B, S, in] aT) * factors [B, S, R]) b, as one node; a [R, in], b [R, out]."""
    return _node(GATED_LOW_RANK, (base, x, a, b, factors), {})


def rules_of(config: GateConfig) -> GateRules:
    """The gate's rules as the operator has them."""
    return GateRules(config.softmax, config.temperature, config.top_k or 0, config.softmax_topk)


def require_row_by_row(config: GateConfig, experts: int) -> None:
    """Refuse a gate that the operator cannot be, by name."""
    if config.softmax_topk and config.topk_softmax is TopkSoftmax.FLATTENED:
        got, need = "--topk-softmax flattened", "a softmax over the experts of each token"
    elif experts > MAX_EXPERTS:
        got, need = f"{experts} experts", f"at most {MAX_EXPERTS}"
    else:
        return
    raise ExportError(
        "the gate's plugin works on one token's experts at a time",
        where="--gate-op plugin",
        got=got,
        need=need,
        fix="--gate-op ops",
        code="E_PLUGIN",
    )


def _node(name: str, inputs: Sequence[torch.Tensor], attributes: dict[str, int | float]) -> torch.Tensor:
    """A node whose output is like its first input (torch.onnx.ops.symbolic: it computes nothing here)."""
    like = inputs[0]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, {**attributes, **PLUGIN_ATTRIBUTES}, dtype=like.dtype, shape=like.shape, version=1
    )
