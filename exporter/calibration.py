"""What the quantised modules read on calibration texts, for methods that round by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from exporter.errors import ExportError
from exporter.parts import Parts, quantizer_of
from exporter.reference import Reference
from exporter.spec import BuildSpec
from exporter.training_texts import read_texts
from runtime.text import Text

LONGEST = 512  # tokens of a text


def calibrate(parts: Parts, spec: BuildSpec, tokenizer: Text | None) -> dict[str, torch.Tensor]:
    """Parameter -> sum of x xT [in, in] in fp64, over all texts as the model runs: gated, or each expert in turn."""
    quantizer = quantizer_of(parts, spec)
    assert quantizer is not None
    if tokenizer is None:
        fix = "use a base with a tokenizer, or --quantize-method rtn"
        raise ExportError("texts need a tokenizer", where="--quantize-texts", got="a base without", fix=fix)
    assert spec.calibration is not None
    longest = min(LONGEST, int(parts.model.config.get_text_config().max_position_embeddings))
    texts = read_texts(spec.calibration, tokenizer, None, longest, parts.model.get_input_embeddings().num_embeddings)
    reference = Reference(parts.model, parts.inputs.adapters, parts.kinds)
    with _summed(parts.model, quantizer.products) as sums:
        for number, text in enumerate(texts):
            _run(reference, text.ids, number)
    names = {id(parameter): name for name, parameter in parts.model.named_parameters()}
    shared = {path: names[id(parts.model.get_submodule(path).weight)] for path in sums}
    # A tied head has its embedding's name, unless a graph unties the two.
    return {name: found for path, found in sums.items() for name in (shared[path], f"{path}.weight")}


def _run(reference: Reference, ids: Sequence[int], number: int) -> None:
    experts = len(reference.experts)
    if reference.gate is not None:
        reference.gated(ids)
    else:
        reference.constant([float(number % (experts + 1) == expert) for expert in range(experts)], ids)


@contextmanager
def _summed(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    sums: dict[str, torch.Tensor] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(end_dim=-2).double()
            sums[path] = sums.get(path, 0) + x.T @ x

        return add

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
