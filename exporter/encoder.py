"""The traced encoder: a Hugging Face encoder as it is, gated modules in place of the adapted ones, pooling behind it.

Right padding is masked by each row's length. One graph serves both passes: the scaling pass reads its gate output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import PreTrainedModel

from exporter.checkpoints import BaseDescription, ModuleKind
from exporter.dynamic import grouped_by_input, replaced
from exporter.gate import Gate
from exporter.gated import Columns, StepState, gated_modules
from exporter.sites import Site, SiteKind
from runtime.manifest import EncoderInfo, Pooling
from runtime.signature import EMBEDDINGS, LOGITS, EncoderShape, Signature, encoder_signature

# Added to scores of padding: exp of it is 0 in every dtype, and float16, bfloat16 and float32 all hold it exactly.
MASKED = -32768.0
LEAST_NORM = 1e-12  # torch.nn.functional.normalize's


class ObservedBackbone(nn.Module):
    """Stands where a classifier's encoder stood and leaves its last hidden state for the gate."""

    def __init__(self, backbone: nn.Module, state: StepState) -> None:
        super().__init__()
        self.backbone, self.state = backbone, state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.backbone(*args, **kwargs)
        self.state.hidden = found[0]
        return found


class TracedEncoder(nn.Module):
    """Whole texts -> embeddings [B, H] or logits [B, L], and the gate [B, S, G, E]."""

    def __init__(
        self, model: PreTrainedModel, state: StepState, info: EncoderInfo, gate: Gate | None, columns: Columns | None
    ) -> None:
        super().__init__()
        self.model, self.state, self.info, self.gate, self.columns = model, state, info, gate, columns

    def forward(
        self,
        *,
        input_ids: torch.Tensor,  # [B, S]
        token_type_ids: torch.Tensor | None = None,  # [B, S]
        lengths: torch.Tensor,  # [B]
        scalings: torch.Tensor | None = None,  # [B, S, G, E]
    ) -> tuple[torch.Tensor, ...]:
        self.state.down.clear()
        if self.columns is not None and scalings is not None:
            self.state.columns = self.columns(scalings)
        real = torch.arange(input_ids.shape[1])[None] < lengths[:, None]  # [B, S]
        types = {}
        if hasattr(embeddings_of(self.model), "token_type_embeddings"):
            types = {"token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids}
        out = self.model(
            input_ids=input_ids,
            attention_mask=torch.where(real, 0.0, MASKED).to(self.model.dtype)[:, None, None],  # [B, 1, 1, S]
            position_ids=positions(self.model, input_ids),
            **types,
        )
        if self.info.pooling is None:
            result = out.logits.float()
        else:
            self.state.hidden = out.last_hidden_state
            result = pooled(out.last_hidden_state.float(), real, lengths, self.info)
        if self.gate is None or scalings is None:
            return (result,)
        assert self.state.hidden is not None
        gate = self.gate(self.state.hidden)
        return result, gate if gate.shape[2] == scalings.shape[2] else gate.expand(-1, -1, scalings.shape[2], -1)


def pooled(hidden: torch.Tensor, real: torch.Tensor, lengths: torch.Tensor, info: EncoderInfo) -> torch.Tensor:
    """[B, H] of hidden states [B, S, H], over the real tokens [B, S] only (sentence-transformers' Pooling)."""
    if info.pooling is Pooling.CLS:
        result = hidden[:, 0]
    elif info.pooling is Pooling.MAX:
        result = torch.where(real[..., None], hidden, torch.finfo(hidden.dtype).min).amax(1)
    else:
        counts = lengths.to(hidden.dtype).clamp_min(1.0)  # in floats: old TensorRT clips no integers
        result = (hidden * real[..., None].to(hidden.dtype)).sum(1) / counts[:, None]
    return F.normalize(result, dim=-1, eps=LEAST_NORM) if info.normalize else result


def positions(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The position ids the model would make itself: 0, 1, 2, … [1, S]; RoBERTa and its kin number what is no padding
    token, from the id after that token's on [B, S]."""
    steps = torch.arange(ids.shape[1])
    padding = getattr(embeddings_of(model), "padding_idx", None)
    if padding is None:
        return steps[None]
    counted = (ids != padding).float()
    before = (steps[:, None] <= steps[None]).float()  # a product, not CumSum, which old TensorRT lacks
    return ((counted @ before) * counted).long() + padding


def embeddings_of(model: PreTrainedModel) -> nn.Module:
    """The module that turns tokens into the first hidden state."""
    backbone = model.base_model
    return (backbone.backbone if isinstance(backbone, ObservedBackbone) else backbone).get_submodule("embeddings")


@contextmanager
def traced_encoder(
    model: PreTrainedModel,
    sites: Sequence[Site],
    gate: Gate | None,
    info: EncoderInfo,
    *,
    shared: bool = False,
    apart: Collection[str] = (),
) -> Iterator[TracedEncoder]:
    """The encoder with its sites gated; `shared` (G = 1) and `apart` as in `traced_model`."""
    state = StepState()
    groups = grouped_by_input(model, sites)
    columns = Columns(groups, sites[0].weights.shape[0], shared=shared) if sites else None
    bases = {site.path: model.get_submodule(site.path) for site in sites}
    modules = gated_modules(bases, groups, state, apart=apart)
    observed = {}
    if info.pooling is None:
        observed = {model.base_model_prefix: ObservedBackbone(model.base_model, state)}
    attention = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        with replaced(model, modules), replaced(model, observed):
            yield TracedEncoder(model, state, info, gate, columns).eval()
    finally:
        model.config._attn_implementation = attention


def signature_of(model: PreTrainedModel, info: EncoderInfo, scalings: int, experts: int, *, gate: bool) -> Signature:
    """The signature of an encoder's graph; G = 0 for a static one."""
    types = getattr(embeddings_of(model), "token_type_embeddings", None)
    width = len(info.labels) if info.pooling is None else int(model.config.hidden_size)
    return encoder_signature(
        EncoderShape(
            output=LOGITS if info.pooling is None else EMBEDDINGS,
            width=width,
            token_types=types is not None and types.num_embeddings > 1,
            scalings=scalings,
            experts=experts,
            gate=gate,
        )
    )


def encoder_kinds(base: BaseDescription, model: PreTrainedModel) -> list[tuple[str, SiteKind]]:
    """Every module an expert may touch, in module-tree order."""
    heads = first_token_modules(model)
    known: Mapping[ModuleKind, SiteKind] = {
        ModuleKind.LINEAR: SiteKind.LINEAR,
        ModuleKind.EMBEDDING: SiteKind.EMBEDDING,
    }
    return [
        (path, SiteKind.FIRST_TOKEN if path in heads else known[info.kind])
        for path, info in base.modules.items()
        if info.kind in known
    ]


def first_token_modules(model: PreTrainedModel) -> set[str]:
    """Linear modules that read one vector a text [B, in]; found by a forward in fake tensors, which reads no weight."""
    found: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: found.add(path) if inputs[0].dim() == 2 else None)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            model(input_ids=torch.zeros(2, 3, dtype=torch.int64))
    finally:
        for hook in hooks:
            hook.remove()
    return found
