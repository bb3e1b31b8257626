"""Attention over a session-owned K/V cache, traced as one node a block; `LowerAttentionPass` says it in operators.

An attention function registered through transformers' AttentionInterface, so that no model code is patched.
See docs/kv.md for how K/V travel and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from exporter.errors import ExportError

ATTENTION_NAME = "xlora_export"
# (query [B, H, S, D], key, value [B, Hkv, S, D], past key, past value [B, Hkv, C, D], lengths [B]) -> [B, S, H, D];
# the last three are left out without a cache. Attributes: heads, kv_heads, scale, and where there are any, window
# and softcap.
DOMAIN, CACHED_ATTENTION = "xlora.attention", "CachedAttention"


class CacheState:
    """The caches of one traced step: past K/V in, new K/V out.

    Row b's cache holds lengths[b] entries; new token i of that row is entry lengths[b] + i.
    """

    def __init__(
        self,
        past: Sequence[torch.Tensor],
        lengths: torch.Tensor | None,
        blocks: Sequence[int] = (),  # which ones `past` is of; none: all
    ) -> None:
        self.past = past  # per block: keys, values [B, Hkv, C, D]
        self._places = {block: place for place, block in enumerate(blocks)}
        self.lengths = lengths  # [B]; None: no cache
        self.present: list[torch.Tensor] = []
        self.windows: set[int | None] = set()  # the sliding windows that blocks have asked for; None: full attention

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model with the new K/V [B, Hkv, S, D]; its attention sees the past ones, too."""
        self.present += [key, value]
        return key, value

    def of_block(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's past keys and values."""
        place = 2 * self._places.get(block, block)
        return self.past[place], self.past[place + 1]

    def get_seq_length(self, *_: Any) -> int:
        """For OPT, which counts positions by it; the traced model is always given them."""
        return 0


def cached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, S, D]
    key: torch.Tensor,  # [B, Hkv, S, D]
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
    cache_state.windows.add(sliding_window)
    past: tuple[torch.Tensor, ...] = ()
    if cache_state.lengths is not None:
        past = (*cache_state.of_block(int(module.layer_idx)), cache_state.lengths)  # type: ignore[arg-type]
    batch, heads, tokens = query.shape[:3]
    attributes: dict[str, Any] = {"heads": heads, "kv_heads": key.shape[1], "scale": float(scaling)}
    attributes |= {} if sliding_window is None else {"window": sliding_window}
    attributes |= {} if softcap is None else {"softcap": float(softcap)}
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{CACHED_ATTENTION}",
        (query, key, value, *past),
        attributes,
        dtype=query.dtype,
        shape=(batch, tokens, heads, value.shape[-1]),
        version=1,
    )
    return out, None


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


AttentionInterface.register(ATTENTION_NAME, cached_attention)
