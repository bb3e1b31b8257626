"""The oracle of an encoder's verification: one text alone, unpadded, expert by expert, pooled in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from exporter.adapters import AdapterSet
from exporter.reference import Reference
from exporter.sites import SiteKind
from runtime.encoder_session import EncodedText
from runtime.manifest import EncoderInfo, Pooling


class EncoderReference(Reference):
    """The passes of `Reference` over an encoder; its `logits` are the text's embedding [1, H] or logits [1, L].

    X-LoRA as PEFT defines it: the gate reads the last hidden state of the scaling pass at every token. PEFT itself
    loads no X-LoRA on these models; tests prove the single parts of this against it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: AdapterSet,
        paths: Sequence[tuple[str, SiteKind]],
        info: EncoderInfo,
        *,
        has_types: bool,
    ) -> None:
        super().__init__(model, adapters, paths)
        self.info, self.has_types = info, has_types

    @torch.no_grad()
    def _forward(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [1, W] and the last hidden state [1, T, H]."""
        types = {}
        if self.has_types and isinstance(tokens, EncodedText):
            types = {"token_type_ids": torch.tensor([tokens.types])}
        out = self.model(input_ids=torch.tensor([list(tokens)]), output_hidden_states=True, **types)
        hidden = out.hidden_states[-1]
        return (out.logits if self.info.pooling is None else self._pooled(hidden)), hidden

    def _pooled(self, hidden: torch.Tensor) -> torch.Tensor:
        """All tokens are real here."""
        [states] = hidden
        if self.info.pooling is Pooling.CLS:
            vector = states[0]
        else:
            vector = states.max(0).values if self.info.pooling is Pooling.MAX else states.mean(0)
        return (vector / vector.square().sum().sqrt() if self.info.normalize else vector)[None]
