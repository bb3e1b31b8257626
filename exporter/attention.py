"""Attention over a session-owned K/V cache, in plain ops or in opset-24 operators.

An attention function registered through transformers' AttentionInterface, so that no model code is patched.
See docs/kv.md for how K/V travel and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import AttentionInterface

from exporter.errors import ExportError
from runtime.signature import CacheStyle

ATTENTION_NAME = "xlora_export"


class CacheState:
    """The caches of one traced step: past K/V in, new (append) or whole (alias) K/V out, and the masks between.

    Row b's cache holds cache_lengths[b] entries; new token i of that row is entry cache_lengths[b] + i.
    """

    def __init__(
        self,
        past: Sequence[torch.Tensor],
        lengths: torch.Tensor | None,
        tokens: int,
        style: CacheStyle,
        blocks: Sequence[int] = (),  # which ones `past` is of; none: all
    ) -> None:
        self.past = past  # per block: keys, values [B, Hkv, C, D]
        self._places = {block: place for place, block in enumerate(blocks)}
        self.lengths = lengths  # [B]
        self.tokens = tokens  # S
        self.style = style
        self.present: list[torch.Tensor] = []
        self._masks: dict[int | None, torch.Tensor] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, block: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model with the new K/V [B, Hkv, S, D]; returns what its attention is to see."""
        if self.style is CacheStyle.ALIAS:
            assert self.lengths is not None
            past_key, past_value = self.of_block(block)
            key = _tensor_scatter(past_key, key, self.lengths)
            value = _tensor_scatter(past_value, value, self.lengths)
        self.present += [key, value]
        return key, value

    def of_block(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's past keys and values."""
        place = 2 * self._places.get(block, block)
        return self.past[place], self.past[place + 1]

    def get_seq_length(self, *_: Any) -> int:
        """For OPT, which counts positions by it; the traced model is always given them."""
        return 0

    @property
    def windows(self) -> frozenset[int | None]:
        """The sliding windows the model's blocks have asked for so far; None is full attention."""
        return frozenset(self._masks)

    def allowed(self, window: int | None) -> torch.Tensor:
        """Which columns a query may see, [B or 1, S, C + S] (append), [B, S, C] (alias) or [1, S, S] (no cache)."""
        if window not in self._masks:
            self._masks[window] = self._allowed(window)
        return self._masks[window]

    def _allowed(self, window: int | None) -> torch.Tensor:
        new = torch.arange(self.tokens)
        own = _visible(new[None, :, None], new[None, None, :], window)  # [1, S, S]
        if self.lengths is None:
            return own
        capacity = torch.arange(self.past[0].shape[2])
        query = self.lengths[:, None, None] + new[None, :, None]  # [B, S, 1]
        if self.style is CacheStyle.ALIAS:
            return _visible(query, capacity[None, None, :], window)
        old = (capacity[None, None, :] < self.lengths[:, None, None]) & _visible(query, capacity[None, None, :], window)
        return torch.cat([old, own.expand(old.shape[0], -1, -1)], dim=-1)


def _visible(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal, and within the sliding window where there is one (key > query - window, as transformers has it)."""
    causal = key <= query
    return causal if window is None else causal & (key > query - window)


def cached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, S, D]
    key: torch.Tensor,  # [B, Hkv, S, D] (append, none) or [B, Hkv, C, D] (alias)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cache_state: CacheState,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of every traced model; returns [B, S, H, D]."""
    allowed = cache_state.allowed(sliding_window)
    if cache_state.style is CacheStyle.ALIAS:
        return _attention_op(query, key, value, allowed, scaling), None
    keys, values = [key], [value]
    if cache_state.style is CacheStyle.APPEND:
        past_key, past_value = cache_state.of_block(int(module.layer_idx))  # type: ignore[arg-type]
        keys, values = [past_key, key], [past_value, value]
    return _split_attention(query, keys, values, allowed, scaling, softcap), None


def _split_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    allowed: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax over the joined scores of cache and new tokens; the caches themselves are never joined nor copied.

    Queries are grouped per K/V head, [B, Hkv, G, S, D], and broadcast against it: no K/V head is repeated in memory.
    The scale comes before the reshape: next to the product ONNX Runtime would fuse it and lose its fast kernel.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads = values[0].shape[1]
    grouped = (query * scaling).contiguous().reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    scores = torch.cat([grouped @ key.unsqueeze(2).transpose(3, 4) for key in keys], dim=-1).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None, None]
    probs = torch.softmax(scores + bias, dim=-1).to(query.dtype)  # [B, Hkv, G, S, C + S]
    ends = list(accumulate((value.shape[2] for value in values), initial=0))  # 0, C, C + S
    parts = [probs[..., start:end] for start, end in pairwise(ends)]
    out = reduce(torch.add, (part @ value.unsqueeze(2) for part, value in zip(parts, values, strict=True)))
    return out.contiguous().reshape(batch, heads, tokens, values[0].shape[-1]).transpose(1, 2)


def require_window(config: Any, state: CacheState) -> None:
    """Refuse a model that puts its sliding window only into the mask, which `cached_attention` does not read.

    Verification would not see it: windows are longer than its prompts.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    if window is not None and "sliding_attention" in kinds and window not in state.windows:
        raise ExportError(
            f"the sliding window of {config.model_type} does not reach its attention function and would be lost",
            where="base",
            got=f"sliding_window {window}",
            fix="families proved to work are listed in the README",
        )


def _attention_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor, scaling: float
) -> torch.Tensor:
    """ONNX Attention (opset 24) with a boolean mask; grouped-query heads are the operator's own.

    The query is scaled outside: ONNX Runtime's operator is slow with a scale of its own (docs/kv.md).
    """
    batch, heads, tokens, _ = query.shape
    out = torch.onnx.ops.symbolic(
        "Attention",
        (query * scaling, key, value, allowed[:, None]),
        {"scale": 1.0},
        dtype=query.dtype,
        shape=(batch, heads, tokens, value.shape[-1]),
        version=24,
    )
    return out.transpose(1, 2)


def _tensor_scatter(past: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """ONNX TensorScatter (opset 24): new [B, Hkv, S, D] written into past [B, Hkv, C, D] at each row's length."""
    return torch.onnx.ops.symbolic(
        "TensorScatter", (past, new, lengths), {"axis": -2}, dtype=past.dtype, shape=past.shape, version=24
    )


AttentionInterface.register(ATTENTION_NAME, cached_attention)
