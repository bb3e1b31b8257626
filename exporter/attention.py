"""Attention over a session-owned K/V cache, traced as one node a block; `LowerAttentionPass` says it in operators.

An attention function registered through transformers' AttentionInterface, so that no model code is patched.
See docs/kv.md for how K/V travel and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self._cached: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by block: what its attention has to read
        self.windows: set[int | None] = set()  # the sliding windows that blocks have asked for; None: full attention

    def update(
        self, key: torch.Tensor, value: torch.Tensor, block: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model with the new K/V [B, Hkv, S, D]; its attention sees the past ones, too."""
        self.present += [key, value]
        self._cached[block] = key, value
        return key, value

    def take(self, block: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Note that a block's attention reads these K/V; raises ExportError for others than it has just cached.

        The past ones come from the cache. An attention that turns them first, or reads them twice, is another one.
        """
        cached = self._cached.pop(block, None)
        if cached is None or cached[0] is not key or cached[1] is not value:
            again, turned = "calls its attention more than once", "changes keys and values after caching them"
            raise ExportError(
                f"this model {again if cached is None else turned}, which a cache of them cannot serve",
                where=f"block {block}",
                need="one attention a block over the keys and values it caches",
                fix="families proved to work are listed in the README", code="E_UNSUPPORTED",
            )  # fmt: skip

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
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of every traced model; returns [B, S, H, D].

    Raises ExportError for an argument that it does not know: it would change the numbers without a word.
    """
    require_known(others)
    cache_state.take(int(module.layer_idx), key, value)  # type: ignore[arg-type]
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


# Of what models and callers pass along, these change nothing where they are as here; None is always so.
HARMLESS = {
    "dropout": (0.0,),
    "is_causal": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (True, False),
    "output_router_logits": (False,),
    "use_cache": (True, False),
    "return_dict": (True, False),
    "deterministic": (True, False),
}
NEVER_READ = frozenset({"position_ids", "cache_position"})  # for packed texts of the flash kernels


def require_known(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of an attention that are not None and that this one does not compute with."""
    strange = [
        name
        for name, value in arguments.items()
        if value is not None and name not in NEVER_READ and not (name in HARMLESS and value in HARMLESS[name])
    ]
    if strange:
        raise ExportError(
            f"its attention takes {', '.join(sorted(strange))}, which the exported attention does not have",
            where="base",
            need="scaling, sliding_window and softcap at most",
            fix="families proved to work are listed in the README",
            code="E_UNSUPPORTED",
        )


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
