"""Mixtral's block experts, all computed and the chosen ones kept, are transformers' own loop over the chosen ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from exporter.errors import ExportError
from exporter.moe import EXPERTS_NAME, dense_experts

EXPERTS, HIDDEN = 5, 16


def block(top_k: int, seed: int = 0) -> Any:
    """A mixture-of-experts block in fp64 with random weights and transformers' loop."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1}
    config = AutoConfig.for_model("mixtral", num_local_experts=EXPERTS, num_experts_per_tok=top_k, **sizes)
    config._experts_implementation = "eager"
    made = MixtralSparseMoeBlock(config).eval().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def tokens(count: int) -> torch.Tensor:
    return torch.randn(2, count, HIDDEN, generator=torch.Generator().manual_seed(count)).double()


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("count", [1, 7])
@torch.no_grad()
def test_dense_is_the_loop(top_k: int, count: int) -> None:
    made = block(top_k)
    loop = made(tokens(count))
    made.experts.config._experts_implementation = EXPERTS_NAME
    assert float((made(tokens(count)) - loop).abs().max()) <= 1e-12
    made.experts.down_proj *= torch.linspace(1, 2, EXPERTS)[:, None, None]
    assert float((made(tokens(count)) - loop).abs().max()) > 0.01, "one block expert in place of another would show"


@torch.no_grad()
def test_what_is_not_chosen_cannot_poison() -> None:
    """In float16 a block expert that no token is for may overflow; its factor of 0 would make that NaN."""
    experts = block(1).experts.half()
    experts.config._experts_implementation = EXPERTS_NAME
    hidden = tokens(3)[0].half()
    chosen, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.float16)
    calm = experts(hidden, chosen, weights)
    experts.gate_up_proj[1:] = 6e4
    wild = experts(hidden, chosen, weights)
    assert torch.isfinite(wild).all()
    assert torch.equal(wild, calm)


@pytest.mark.parametrize(
    ("form", "got"),
    [
        ({"is_transposed": True, "has_bias": True}, "got is_transposed, has_bias;"),
        ({"has_post_expert_norm": True}, "got has_post_expert_norm;"),
        ({"has_gate": False}, "got no gate projection;"),
    ],
)
def test_other_forms_are_refused_by_name(form: dict[str, bool], got: str) -> None:
    plain = {"is_transposed": False, "has_bias": False, "has_post_expert_norm": False, "has_gate": True}
    experts = SimpleNamespace(**plain | form)
    with pytest.raises(ExportError, match=f"base: SimpleNamespace has block experts of a form .*; {got} need gate_up"):
        dense_experts(experts, torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))
