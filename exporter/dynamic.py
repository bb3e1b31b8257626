"""Dynamic mode: base modules replaced by gated ones, and the traced model around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from exporter.attention import ATTENTION_NAME, CacheState, require_window
from exporter.gate import Gate
from exporter.sites import Site, SiteKind
from runtime.signature import CacheStyle


@dataclass(slots=True)
class StepState:
    """What gated modules and the head read and leave during one forward of the traced model."""

    columns: Sequence[torch.Tensor] = ()  # per site [B, S, R]: the factor of every rank column
    logit_index: torch.Tensor | None = None  # [B, K]
    hidden: torch.Tensor | None = None  # [B, S, H] after the final norm


class Columns(nn.Module):
    """scalings [B, S, G, E] -> the factors s . weights of every rank column, of all sites in one lookup.

    A column belongs to one expert, so weights [E, R] has one entry a column: its place `index` and its value `scale`.
    """

    def __init__(self, sites: Sequence[Site], experts: int, *, shared: bool) -> None:
        super().__init__()
        index = [site.weights.abs().argmax(0) + (0 if shared else site.index * experts) for site in sites]
        self.index = nn.Parameter(torch.cat(index), requires_grad=False)
        self.scale = nn.Parameter(torch.cat([site.weights.sum(0) for site in sites]), requires_grad=False)
        self.ranks = [site.weights.shape[1] for site in sites]

    def forward(self, scalings: torch.Tensor) -> Sequence[torch.Tensor]:
        factors = scalings.flatten(2).index_select(2, self.index) * self.scale  # [B, S, sum of R]
        return factors.split(self.ranks, dim=-1)


LORA_LEAVES = ("lora_a", "lora_b")


class GatedModule(nn.Module):
    """A base module plus the gated low-rank update of its site: y = W x + ((x aT) * (s . weights)) bT."""

    def __init__(self, base: nn.Module, site: Site, state: StepState) -> None:
        super().__init__()
        self.base = base
        self.path = site.path
        self.site = site.index
        self.state = state
        dtype = next(base.parameters()).dtype
        self.lora_a = nn.Parameter(site.a.to(dtype), requires_grad=False)
        self.lora_b = nn.Parameter(site.b.to(dtype), requires_grad=False)

    def columns(self) -> torch.Tensor:
        """The factor of every rank column of this site: s . weights, [B, S, R]."""
        return self.state.columns[self.site]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_a) * self.columns().to(x.dtype), self.lora_b)


class GatedEmbedding(GatedModule):
    """Token lookup in a (kept as [vocab, R]), gated, then b; times the base's embed_scale (PEFT lora.Embedding)."""

    def __init__(self, base: nn.Module, site: Site, state: StepState) -> None:
        super().__init__(base, site, state)
        self.lora_a = nn.Parameter(self.lora_a.T.contiguous(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = F.embedding(x, self.lora_a)
        delta = F.linear(looked_up * self.columns().to(looked_up.dtype), self.lora_b)
        scale = getattr(self.base, "embed_scale", None)
        return self.base(x) + (delta if scale is None else delta * scale.to(delta.dtype))


class GatedHead(GatedModule):
    """An adapted lm_head: sees only the picked positions, so its scalings are picked too."""

    def columns(self) -> torch.Tensor:
        assert self.state.logit_index is not None
        return pick(super().columns(), self.state.logit_index)


class PickingHead(nn.Module):
    """Stands where lm_head stood: leaves the hidden state for the gate, computes logits for picked positions only."""

    def __init__(self, head: nn.Module, state: StepState) -> None:
        super().__init__()
        self.head = head
        self.state = state

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.state.logit_index is not None
        self.state.hidden = hidden
        return self.head(pick(hidden, self.state.logit_index))


def pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, S, D] at index [B, K] -> [B, K, D]."""
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


GATED: Mapping[SiteKind, type[GatedModule]] = {
    SiteKind.LINEAR: GatedModule,
    SiteKind.CONV1D: GatedModule,
    SiteKind.EMBEDDING: GatedEmbedding,
    SiteKind.LM_HEAD: GatedHead,
}


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `modules` in place of the ones at their paths; the model gets its own modules back at the end."""
    originals = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)


class TracedModel(nn.Module):
    """One decoder step of the design's signature, built on the Hugging Face model as it is."""

    def __init__(
        self, model: PreTrainedModel, state: StepState, gate: Gate | None, columns: Columns | None, cache: CacheStyle
    ) -> None:
        super().__init__()
        self.model = model
        self.gate = gate
        self.columns = columns
        self.state = state
        self.cache = cache

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, S]
        position_ids: torch.Tensor,  # [B, S]
        cache_lengths: torch.Tensor | None,  # [B]
        scalings: torch.Tensor | None,  # [B, S, G, E]
        logit_index: torch.Tensor,  # [B, K]
        past: Sequence[torch.Tensor],  # per block: keys, values [B, Hkv, C, D]
    ) -> tuple[torch.Tensor, ...]:
        self.state.logit_index = logit_index
        if self.columns is not None and scalings is not None:
            self.state.columns = self.columns(scalings)
        cache = CacheState(past, cache_lengths, input_ids.shape[1], self.cache)
        logits = self.model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True, cache_state=cache
        ).logits
        require_window(self.model.config.get_text_config(), cache)
        assert self.state.hidden is not None
        gate = () if self.gate is None else (self.gate(self.state.hidden),)
        return (logits, *gate, *(cache.present if self.cache is not CacheStyle.NONE else ()))


@contextmanager
def traced_model(
    model: PreTrainedModel, sites: Sequence[Site], gate: Gate | None, cache: CacheStyle, *, shared: bool = False
) -> Iterator[TracedModel]:
    """The model with its sites gated, its head picking and its attention reading session-owned caches.

    `shared`: all sites read the same scalings (G = 1).
    """
    state = StepState()
    columns = Columns(sites, sites[0].weights.shape[0], shared=shared) if sites else None
    modules: dict[str, nn.Module] = {s.path: GATED[s.kind](model.get_submodule(s.path), s, state) for s in sites}
    head = head_path(model)
    modules[head] = PickingHead(modules.get(head, model.get_submodule(head)), state)
    attention = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION_NAME
    try:
        with replaced(model, modules):
            yield TracedModel(model, state, gate, columns, cache).eval()
    finally:
        model.config._attn_implementation = attention


def head_path(model: PreTrainedModel) -> str:
    """The module path of the output embedding ("lm_head")."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)
