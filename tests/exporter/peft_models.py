"""PEFT as an oracle for whole models: one LoRA alone, merged, greedy text, and X-LoRA on families its loader misses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.exporter.checkpoint_makers import load_model, make_xlora
from tests.same_tokens import Logits


def peft_lora(base: Path, adapter: Path) -> Any:
    """The base with one LoRA, not merged."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(base), str(adapter)).eval()


def merged_model(base: Path, adapter: Path) -> Any:
    """A plain transformers model with the LoRA folded in by PEFT; ties must not be touched, PEFT would fold twice."""
    return peft_lora(base, adapter).merge_and_unload().eval()


@torch.no_grad()
def logits_of(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] in one pass without a cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


@torch.no_grad()
def greedy(model: Any, tokens: Sequence[int], new_tokens: int) -> Logits:
    """What transformers' own `generate`, with its own K/V cache, chooses each new token from."""
    result = model.generate(
        input_ids=torch.tensor([list(tokens)]), attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        max_new_tokens=new_tokens, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return [step[0].numpy().astype(np.float32) for step in result.logits]


MARK = "model.@."  # PEFT's loader leaves a key alone that begins so, and puts "model." before it


@contextmanager
def any_prefix() -> Iterator[None]:
    """Let PEFT's X-LoRA load experts whose keys are not `base_model.model.model.`, as GPT-2's and GPT-NeoX's.

    Its loader cuts keys until they begin with "model." and knows no other backbone; nothing but that is changed.
    """
    import peft.tuners.xlora.model as xlora
    import peft.utils.save_and_load as files

    read, put = files.load_peft_weights, xlora.set_peft_model_state_dict

    def marked(*args: Any, **settings: Any) -> dict[str, torch.Tensor]:
        return {MARK + key.removeprefix("base_model.model."): value for key, value in read(*args, **settings).items()}

    def unmarked(model: Any, weights: Mapping[str, torch.Tensor], **settings: Any) -> Any:
        return put(model, {key.replace(f"model.{MARK}", "model."): value for key, value in weights.items()}, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "load_peft_weights", marked)
        patch.setattr(xlora, "set_peft_model_state_dict", unmarked)
        yield


def xlora_model(base: Path, experts: Sequence[Path], **config: Any) -> Any:
    """PEFT's live X-LoRA with a random gate, on any family."""
    with any_prefix():
        return make_xlora(base, experts, **config).eval()
