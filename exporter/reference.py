"""The oracle of verification: X-LoRA as PEFT computes it, expert by expert, without cache, in fp32 torch.

Written apart from `dynamic` and `gate` on purpose: it shares no maths with what is exported. Tests prove it equal
to PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from exporter.adapters import AdapterSet, Expert, GateConfig, LoraDelta, Replacement
from exporter.dynamic import implemented, replaced
from exporter.sites import SiteKind
from runtime.manifest import TopkSoftmax


@dataclass(frozen=True, slots=True)
class ReferenceResult:
    """One sequence: logits [T, V] and, with a gate, the scalings the gate gave [T, G, E].

    `margin` [T] with a router inside the sites: the closest of each token's choices, relative to what was kept last.
    """

    logits: torch.Tensor
    gate: torch.Tensor | None
    margin: torch.Tensor | None = None


class _Scalings:
    """What the looped modules read during one pass: raw scalings [1, T, n_sites, E]."""

    value: torch.Tensor


class LoopedModule(nn.Module):
    """base(x) + sum over experts, in column order, of B(A(x * s)) * scale * global weight (PEFT XLoraLinearLayer).

    An expert with magnitudes is DoRA and has s = 1 or 0 (PEFT DoraLinearLayer).
    """

    def __init__(self, base: nn.Module, deltas: Sequence[LoraDelta | None], index: int, scalings: _Scalings) -> None:
        super().__init__()
        self.base, self.deltas, self.index, self.scalings = base, deltas, index, scalings
        self.factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scalings = self.row()
        base = result = self.base(x)
        scalings = scalings.reshape(*result.shape[:-1], -1)  # OPT's MLP sees its tokens as [T, .]
        for e, delta in enumerate(self.deltas):
            scaled = scalings[..., e, None] * self.factor
            if delta is not None and delta.magnitude is None:
                result = result + self.delta(x, delta, scaled) * delta.scale
            elif delta is not None and scaled.any():
                result = result + self.dora(x, delta, scaled, base)
        return result

    def row(self) -> torch.Tensor:
        """The scalings of this site [1, T, E]."""
        return self.scalings.value[:, :, self.index]

    def dora(self, x: torch.Tensor, delta: LoraDelta, scaled: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """What PEFT adds: (m / norm - 1) * base without its bias + m / norm * the update."""
        assert delta.magnitude is not None
        ratio = delta.magnitude.to(base.dtype) / self.norm(delta)
        bias = getattr(self.base, "bias", None)
        unbiased = base if bias is None else base - bias
        return (ratio - 1) * unbiased * scaled.to(base.dtype) + ratio * self.delta(x, delta, scaled) * delta.scale

    def norm(self, delta: LoraDelta) -> torch.Tensor:
        """The length of every output's weights with the whole update; Conv1D stores them in columns."""
        weight = self.base.get_parameter("weight")
        update = delta.scale * (delta.b.to(weight.dtype) @ delta.a.to(weight.dtype))
        turned = weight.T if isinstance(self.base, Conv1D | nn.Embedding) else weight
        return (turned + update).square().sum(1).sqrt()

    def delta(self, x: torch.Tensor, delta: LoraDelta, scaled: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x * scaled.to(x.dtype), delta.a.to(x.dtype)), delta.b.to(x.dtype))


class LoopedEmbedding(LoopedModule):
    """The same for a token lookup (PEFT XLoraEmbeddingLayer), times the base's embed_scale."""

    def delta(self, x: torch.Tensor, delta: LoraDelta, scaled: torch.Tensor) -> torch.Tensor:
        dtype = next(self.base.parameters()).dtype
        looked_up = F.embedding(x, delta.a.T.to(dtype)) * scaled.to(dtype)
        return F.linear(looked_up, delta.b.to(dtype)) * getattr(self.base, "embed_scale", 1.0)


class LoopedFirstToken(LoopedModule):
    """The same for a module that reads the first token only [1, in]: that token's scalings are its own.

    PEFT has no rule here: its XLoraLinearLayer multiplies [1, in] by [1, T, 1].
    """

    def row(self) -> torch.Tensor:
        return super().row()[:, 0]  # [1, E]


class MergedModule(nn.Module):
    """base(x) + x deltaT: a static mix whose updates were merged into one delta [out, in] a module."""

    def __init__(self, base: nn.Module, delta: torch.Tensor) -> None:
        super().__init__()
        self.base, self.delta = base, delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(x, self.delta.to(x.dtype))


class MergedEmbedding(MergedModule):
    """The same for a token lookup, times the base's embed_scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base(x)
        return result + F.embedding(x, self.delta.T.to(result.dtype)) * getattr(self.base, "embed_scale", 1.0)


LOOPED: Mapping[SiteKind, type[LoopedModule]] = {
    SiteKind.EMBEDDING: LoopedEmbedding,
    SiteKind.FIRST_TOKEN: LoopedFirstToken,
}


class Reference:
    """Two full passes per sequence (or one under constant scalings) on the Hugging Face model with eager attention."""

    def __init__(self, model: PreTrainedModel, adapters: AdapterSet, paths: Sequence[tuple[str, SiteKind]]) -> None:
        self.model, self.experts, self.gate = model, adapters.experts, adapters.gate
        self.sites = [(path, kind) for path, kind in paths if any(path in e.deltas for e in adapters.experts)]

    def precise(self) -> Reference:
        """The same with fp64 products on a copy of the model, to tell how noisy fp32 is here.

        Norms, rotary angles and softmax stay fp32: transformers computes them so whatever the dtype.
        """
        precise = copy.copy(self)
        precise.model = copy.deepcopy(self.model).double()
        for module in precise.model.modules():
            if hasattr(module, "reorder_and_upcast_attn"):  # GPT-2's, for fp16 only: it takes scores of fp32 alone
                module.reorder_and_upcast_attn = False
        return precise

    def constant(self, row: Sequence[float] | Sequence[Sequence[float]], tokens: Sequence[int]) -> ReferenceResult:
        """One pass with the same scalings everywhere [E], or those of each site [sites, E]; no top-k rule applies."""
        with self._replaced(row), self._looped() as scalings:
            scalings.value = self._filled(torch.tensor(row), len(tokens))
            return ReferenceResult(self._forward(tokens)[0], None)

    def merged(self, deltas: Mapping[str, torch.Tensor], tokens: Sequence[int]) -> ReferenceResult:
        """One pass with one delta [out, in] a module in place of the experts."""
        kinds = dict(self.sites)
        modules = {
            path: (MergedEmbedding if kinds[path] is SiteKind.EMBEDDING else MergedModule)(
                self.model.get_submodule(path), delta
            )
            for path, delta in deltas.items()
        }
        return self.substituted(modules, tokens)

    def substituted(self, modules: Mapping[str, nn.Module], tokens: Sequence[int]) -> ReferenceResult:
        """One pass with these modules in place of those at their paths."""
        with self._with(modules):
            return ReferenceResult(self._forward(tokens)[0], None)

    @torch.no_grad()
    def effective(
        self, row: Sequence[float] | Sequence[Sequence[float]], paths: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Path -> what these modules do with constant scalings, as one weight that lies as the module's own does.

        Read off the unit vectors, or off every token of an embedding.
        """
        found = {}
        with self._replaced(row), self._looped() as scalings:
            for path in paths:
                module = self.model.get_submodule(path)
                base = getattr(module, "base", module)
                inputs = base.weight.shape[0 if isinstance(base, Conv1D | nn.Embedding) else 1]
                scalings.value = self._filled(torch.tensor(row), inputs)
                if isinstance(base, nn.Embedding):
                    found[path] = module(torch.arange(inputs)[None])[0] / getattr(base, "embed_scale", 1.0)
                    continue
                bias = 0.0 if getattr(base, "bias", None) is None else base.bias
                turned = module(torch.eye(inputs)[None])[0] - bias  # [in, out]
                found[path] = turned if isinstance(base, Conv1D) else turned.T
        return found

    def gated(self, tokens: Sequence[int]) -> ReferenceResult:
        """X-LoRA: the scaling pass, the classifier, the main pass."""
        assert self.gate is not None
        with self._looped() as scalings:
            dummy = torch.full((len(self.experts),), self.gate.scaling_pass_value)
            scalings.value = _layer_rules(self._filled(dummy, len(tokens)), self.gate)
            hidden = self._forward(tokens)[1]
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # a gate is never rounded
            raw = _classify(hidden, self.gate, len(self.experts))  # [1, T, G, E]
            shown = _layer_rules(raw, self.gate)
            scalings.value = shown.expand(-1, -1, len(self.sites), -1)
            return ReferenceResult(self._forward(tokens)[0], shown[0])

    @contextmanager
    def _replaced(self, row: Sequence[object]) -> Iterator[None]:
        """What PEFT does for modules_to_save and trainable_token_indices of the only expert with a scaling."""
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        used = torch.tensor(row).reshape(-1, len(self.experts)).ne(0).any(0).tolist()
        for expert in (expert for is_used, expert in zip(used, self.experts, strict=True) if is_used):
            for name, new in _as_peft_ties(self.model, expert.replacements).items():
                path, _, leaf = name.rpartition(".")
                module, base = self.model.get_submodule(path), self.model.get_parameter(name)
                before.append((module, leaf, base))
                setattr(module, leaf, nn.Parameter(_new_values(base, new), requires_grad=False))
        try:
            yield
        finally:
            for module, leaf, old in reversed(before):
                setattr(module, leaf, old)

    def _filled(self, row: torch.Tensor, tokens: int) -> torch.Tensor:
        return row.expand(1, tokens, len(self.sites), -1).clone()

    @torch.no_grad()
    def _forward(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] and the hidden state after the final norm [1, T, H]."""
        out = self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False, output_hidden_states=True)
        return out.logits[0], out.hidden_states[-1]

    @contextmanager
    def _looped(self) -> Iterator[_Scalings]:
        scalings = _Scalings()
        modules: dict[str, nn.Module] = {}
        for index, (path, kind) in enumerate(self.sites):
            cls = LOOPED.get(kind, LoopedModule)
            module = cls(self.model.get_submodule(path), _deltas(self.experts, path), index, scalings)
            module.factor = self.gate.global_scaling_weight if self.gate else 1.0
            modules[path] = module
        with self._with(modules):
            yield scalings

    @contextmanager
    def _with(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        with implemented(self.model, "eager", "eager"), replaced(self.model, modules):
            yield


def _as_peft_ties(model: PreTrainedModel, replacements: Mapping[str, Replacement]) -> dict[str, Replacement]:
    """PEFT's set_additional_trainable_modules: rows of the embedding go to the head, too, where the config says tied.

    It asks the config alone. The head then keeps its other rows, whether they are the embedding's or its own.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    paths = {module: path for path, module in model.named_modules()}
    rows = replacements.get(f"{paths.get(embedding)}.weight")
    is_tied = model.config.to_dict().get("tie_word_embeddings") and getattr(model, "_tied_weights_keys", None)
    if not is_tied or head is None or rows is None or rows.rows is None:
        return dict(replacements)
    return {f"{paths[head]}.weight": rows, **replacements}  # the head's own come last and win


def _new_values(base: torch.Tensor, new: Replacement) -> torch.Tensor:
    if new.rows is None:
        return new.values.to(base.dtype)
    values = base.detach().clone()
    values[list(new.rows)] = new.values.to(base.dtype)
    return values


def _deltas(experts: Sequence[Expert], path: str) -> list[LoraDelta | None]:
    return [expert.deltas.get(path) for expert in experts]


def _classify(hidden: torch.Tensor, gate: GateConfig, experts: int) -> torch.Tensor:
    """PEFT XLoraClassifier.forward, up to and with the softmax: [1, T, G, E]."""
    x = hidden
    last = len(gate.weights) - 1
    for i, (weight, bias) in enumerate(zip(gate.weights, gate.biases, strict=True)):
        x = x @ weight.T.to(x.dtype) + (0.0 if bias is None else bias)
        x = x.clamp_min(0) if gate.relu and i < last else x
    logits = x.reshape(*x.shape[:2], -1, experts)
    return (logits / gate.temperature).softmax(-1) if gate.softmax else logits


def _layer_rules(scalings: torch.Tensor, gate: GateConfig) -> torch.Tensor:
    """PEFT XLoraLayer.get_maybe_topk_scalings, site by site, with -inf masks and boolean indexing as written there."""
    return torch.stack([_site_rules(s, gate) for s in scalings.unbind(2)], dim=2)


def _site_rules(scalings: torch.Tensor, gate: GateConfig) -> torch.Tensor:
    if gate.top_k is not None:
        chosen = scalings.topk(gate.top_k, dim=-1).indices
        scalings = scalings * torch.zeros_like(scalings).scatter(-1, chosen, 1.0)
    if not gate.softmax_topk:
        return scalings
    kept = scalings != 0
    if gate.topk_softmax is TopkSoftmax.FLATTENED:
        result = torch.zeros_like(scalings)
        result[kept] = scalings[kept].softmax(-1)  # over all tokens together, as PEFT did before 0.18
        return result
    return scalings.masked_fill(~kept, -torch.inf).softmax(-1).masked_fill(~kept, 0.0)
