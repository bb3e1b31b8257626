"""The gate: hidden state after the final norm -> scalings, in fp32 plain ops (PEFT XLoraClassifier and XLoraLayer)."""

from __future__ import annotations

import torch
from torch import nn

from exporter.adapters import GateConfig
from exporter.plugin_nodes import gate_scalings, require_row_by_row
from runtime.manifest import GateInfo, TopkSoftmax

# A finite "minus infinity": all--inf rows give NaN in every dtype (and fp16 engines would not recover).
MASKED = torch.finfo(torch.float32).min


class Gate(nn.Module):
    """Classifier, softmax, top-k, top-k softmax: hidden [B, S, H] -> scalings [B, S, G, E], G = sites or 1."""

    def __init__(self, config: GateConfig, experts: int) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.layers = nn.ModuleList(
            _linear(weight, bias) for weight, bias in zip(config.weights, config.biases, strict=True)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.float()
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.config.relu and i < len(self.layers) - 1:
                x = torch.relu(x)
        return self.scalings(x.unflatten(-1, (-1, self.experts)))  # flat index = site * E + expert

    def scalings(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax, top-k and top-k softmax of logits [B, S, G, E]."""
        scalings = torch.softmax(logits / self.config.temperature, dim=-1) if self.config.softmax else logits
        return apply_topk_rules(scalings, self.config)


class PluginGate(Gate):
    """The same with everything behind the classifier in one node; it can be traced but not run here."""

    def __init__(self, config: GateConfig, experts: int) -> None:
        require_row_by_row(config, experts)
        super().__init__(config, experts)

    def scalings(self, logits: torch.Tensor) -> torch.Tensor:
        return gate_scalings(logits, self.config)


def apply_topk_rules(scalings: torch.Tensor, config: GateConfig) -> torch.Tensor:
    """Top-k and top-k softmax of [B, S, G, E], as PEFT's XLoraLayer.get_maybe_topk_scalings does per site.

    A selected value of exactly 0 is dropped by the top-k softmax; a row with nothing left stays zero.
    """
    if config.top_k is not None:
        chosen = torch.topk(scalings, config.top_k, dim=-1).indices  # [B, S, G, k]
        experts = torch.arange(scalings.shape[-1])
        kept = (chosen.unsqueeze(-1) == experts).any(dim=-2)  # a comparison, not ScatterElements
        scalings = torch.where(kept, scalings, torch.zeros_like(scalings))
    if config.softmax_topk:
        over = (-1,) if config.topk_softmax is TopkSoftmax.TOKEN else (0, 1, -1)
        scalings = _masked_softmax(scalings, scalings != 0, over)
    return scalings


def _masked_softmax(x: torch.Tensor, mask: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
    """Softmax of the masked-in entries over `over`; zero elsewhere, and no NaN for an empty row."""
    masked = torch.where(mask, x, torch.full_like(x, MASKED))
    exp = torch.where(mask, torch.exp(masked - masked.amax(dim=over, keepdim=True)), torch.zeros_like(x))
    return exp / exp.sum(dim=over, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def scaling_pass_row(config: GateConfig, experts: int) -> torch.Tensor:
    """The constant scalings [E] of the scaling pass: `scaling_pass_value` after the top-k rules.

    Under the flattened rule a non-zero row is divided by the sequence length at run time (`GateInfo`).
    """
    return apply_topk_rules(torch.full((1, 1, 1, experts), config.scaling_pass_value), config).flatten()


def gate_info(config: GateConfig, experts: int) -> GateInfo:
    """The manifest's record of the gate."""
    flattened = config.softmax_topk and config.topk_softmax is TopkSoftmax.FLATTENED
    return GateInfo(
        depth=len(config.weights),
        layerwise=config.layerwise,
        softmax=config.softmax,
        temperature=config.temperature,
        top_k=config.top_k,
        softmax_topk=config.softmax_topk,
        topk_softmax=config.topk_softmax,
        scaling_pass_value=config.scaling_pass_value,
        scaling_pass_row=tuple(scaling_pass_row(config, experts).tolist()),
        scaling_pass_row_per_length=flattened,
        global_scaling_weight=config.global_scaling_weight,
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer
