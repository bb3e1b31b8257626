"""Dynamic mode: the traced model, with gated modules in place of the adapted ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from exporter.attention import ATTENTION_NAME, CacheState, require_window
from exporter.errors import ExportError
from exporter.gate import Gate
from exporter.gated import Columns, StepState, gated_modules, pick
from exporter.hot_sites import HotColumns, hot_modules
from exporter.moe import EXPERTS_NAME
from exporter.routers import make_router, routable_sites
from exporter.sites import Site, SiteKind
from runtime.errors import UserError
from runtime.routers import RouterInfo
from runtime.signature import CacheStyle

MODEL = "model"  # the attribute that holds the Hugging Face model in the traced one


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


class TracedModel(nn.Module):
    """One decoder step of the design's signature, built on the Hugging Face model as it is."""

    def __init__(
        self,
        model: PreTrainedModel,
        state: StepState,
        gate: Gate | None,
        columns: Columns | HotColumns | None,
        cache: CacheStyle,
        hot: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.gate = gate
        self.columns = columns
        self.state = state
        self.cache = cache
        self.hot = hot  # names of the adapter inputs
        self.blocks: Sequence[int] = ()  # those that `past` is of, where some stand for all

    def forward(
        self,
        *,
        input_ids: torch.Tensor,  # [B, S]
        position_ids: torch.Tensor,  # [B, S]
        cache_lengths: torch.Tensor | None = None,  # [B]
        scalings: torch.Tensor | None = None,  # [B, S, G, E]
        router: torch.Tensor | None = None,  # [B]
        logit_index: torch.Tensor,  # [B, K]
        past: Sequence[torch.Tensor] = (),  # per block: keys, values [B, Hkv, C, D]
        adapters: Sequence[torch.Tensor] = (),  # runtime.adapter_inputs, in the order of `hot`
    ) -> tuple[torch.Tensor, ...]:
        self.state.logit_index = logit_index
        self.state.down.clear()
        self.state.is_routed = None if router is None else (router > 0.5)[:, None, None]
        self.state.adapters = dict(zip(self.hot, adapters, strict=True))
        if self.columns is not None and scalings is not None:
            self.state.columns = self.columns(scalings)
        cache = CacheState(past, cache_lengths, self.blocks)
        logits = self.model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True, cache_state=cache
        ).logits
        require_window(self.model.config.get_text_config(), cache)
        assert self.state.hidden is not None
        gate = () if self.gate is None or scalings is None else (self._scalings(self.gate, scalings.shape[2]),)
        return (logits, *gate, *(cache.present if self.cache is not CacheStyle.NONE else ()))

    def _scalings(self, gate: Gate, rows: int) -> torch.Tensor:
        """What the gate says [B, S, G, E]; a gate with one row for all sites says it to each."""
        assert self.state.hidden is not None
        scalings = gate(self.state.hidden)
        return scalings if scalings.shape[2] == rows else scalings.expand(-1, -1, rows, -1)


@contextmanager
def traced_model(
    model: PreTrainedModel,
    sites: Sequence[Site],
    gate: Gate | None,
    cache: CacheStyle,
    *,
    shared: bool = False,
    with_plugin: bool = False,
    router: RouterInfo | None = None,
    hot: Sequence[str] = (),
    apart: Collection[str] = (),
) -> Iterator[TracedModel]:
    """The model with its sites gated, its head picking and its attention reading session-owned caches.

    `shared`: all sites read the same scalings (G = 1). `with_plugin`: each update is one node of ours.
    `router`: every site also has this router, for rows that switch it on.
    `hot`: names of the adapter inputs, for a graph that has its adapters there.
    `apart`: paths whose weights stay in products of their own.
    """
    state = StepState()
    sites = routable_sites(sites, router)
    groups = [[site] for site in sites] if with_plugin else grouped_by_input(model, sites)
    bases = {site.path: model.get_submodule(site.path) for site in sites}
    columns: Columns | HotColumns | None = None
    modules: dict[str, nn.Module] = {}
    if hot:
        columns, modules = HotColumns(groups, state, shared=shared), {**hot_modules(bases, groups, state)}
    elif sites:
        columns = Columns(groups, sites[0].weights.shape[0], shared=shared)
        routers = [make_router(group, router) for group in groups]
        modules = {**gated_modules(bases, groups, state, with_plugin=with_plugin, routers=routers, apart=apart)}
    head = head_path(model)
    modules[head] = PickingHead(modules.get(head, model.get_submodule(head)), state)
    with implemented(model, ATTENTION_NAME, EXPERTS_NAME), replaced(model, modules):
        yield TracedModel(model, state, gate, columns, cache, hot).eval()


@contextmanager
def implemented(model: PreTrainedModel, attention: str, experts: str) -> Iterator[None]:
    """Let the model compute attention and mixture-of-experts blocks by these functions of transformers' interfaces."""
    config = model.config
    before = config._attn_implementation, config._experts_implementation
    config._attn_implementation, config._experts_implementation = attention, experts
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation = before


@contextmanager
def without_padding_token(model: PreTrainedModel) -> Iterator[None]:
    """The config without its padding token: with one, transformers looks for it in the ids, and fake ones have none.

    Only to warn (`warn_if_padding_and_no_attention_mask`): no decoder computes with it.
    """
    config = model.config
    before = getattr(config, "pad_token_id", None)
    if before is not None:
        config.pad_token_id = None
    try:
        yield
    finally:
        if before is not None:
            config.pad_token_id = before


@contextmanager
def refusing_untraceable(model: PreTrainedModel, where: str) -> Iterator[None]:
    """Whatever a model's own code raises in here becomes one error that names the model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ExportError(
            f"this {model.config.model_type} model cannot be traced as it is",
            where=where,
            got=f"{type(error).__name__}: {lines[0][:300]}",
            fix="families proved to work are listed in the README",
        ) from error


def cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, width) of what every block puts into its cache, by one forward in fake tensors, which reads no weight.

    A config may hold fields of these names that its model does not read.
    """
    state, ids = CacheState((), None), torch.zeros(1, 2, dtype=torch.int64)
    with (
        refusing_untraceable(model, "base"),
        implemented(model, ATTENTION_NAME, EXPERTS_NAME),
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
        without_padding_token(model),
    ):
        model.base_model(input_ids=ids, position_ids=ids, past_key_values=state, use_cache=True, cache_state=state)
    if not state.windows:  # or its cache would be filled and never read, and no token kept from later ones
        raise ExportError(
            f"{model.config.model_type} computes its attention by code of its own",
            where="base",
            need="attention through transformers' AttentionInterface",
            fix="families proved to work are listed in the README",
            code="E_UNSUPPORTED",
        )
    shapes = [(int(entry.shape[1]), int(entry.shape[3])) for entry in state.present]
    if len(shapes) != 2 * model.config.get_text_config().num_hidden_layers or shapes[::2] != shapes[1::2]:
        raise ExportError(
            f"{model.config.model_type} does not put keys and values of one shape into a cache in every block",
            where="base",
            got=f"{len(shapes)} tensors of {sorted(set(shapes))} (heads, width)",
            fix="families proved to work are listed in the README",
            code="E_UNSUPPORTED",
        )
    return shapes[::2]


def grouped_by_input(model: PreTrainedModel, sites: Sequence[Site]) -> list[list[Site]]:
    """Sites whose modules read the very same tensor (q, k and v; gate and up), each group in site order.

    Found by one forward of the model in fake tensors, which reads no weight. Embeddings and heads stay alone.
    """
    read: dict[str, torch.Tensor] = {}  # kept alive, so that no identity comes back for another tensor
    linear = [site for site in sites if site.kind in (SiteKind.LINEAR, SiteKind.CONV1D)]
    hooks = [
        model.get_submodule(site.path).register_forward_pre_hook(
            lambda _, inputs, path=site.path: read.setdefault(path, inputs[0])
        )
        for site in linear
    ]
    try:
        if linear:
            with (
                implemented(model, "eager", EXPERTS_NAME),
                torch.no_grad(),
                FakeTensorMode(allow_non_fake_inputs=True),
                without_padding_token(model),
            ):
                model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[object, list[Site]] = {}
    for site in sites:
        groups.setdefault(id(read[site.path]) if site.path in read else site.path, []).append(site)
    return list(groups.values())


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


def head_path(model: PreTrainedModel) -> str:
    """The module path of the output embedding ("lm_head")."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)
