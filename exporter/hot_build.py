"""Adapters as inputs: which modules may be adapted, the layout of the inputs, and the stack a bundle starts with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from exporter.adapters import AdapterSet, Expert, LoraDelta
from exporter.checkpoints import BaseDescription, ModuleKind
from exporter.dynamic import grouped_by_input
from exporter.errors import ExportError
from exporter.sites import Site
from exporter.spec import BuildSpec, HotSpec, OpChoice
from exporter.store import Weight, weight_from_tensor
from runtime.adapter_folder.lora_tensors import LoraTensors
from runtime.adapter_folder.patterns import is_named
from runtime.adapter_folder.problems import listed
from runtime.adapter_inputs import STACK_PATH
from runtime.errors import InputError, raise_all
from runtime.manifest import AdapterKind, HotInfo, HotSite, Mode
from runtime.routers import RouterKind
from runtime.site_groups import joined_path
from runtime.stacks import Stack, StackBuilder

ALL_LINEAR = "all-linear"
PROBE_RANK = 4


def check_hot_spec(spec: BuildSpec) -> None:
    """Refuse settings that contradict each other, before anything is read."""
    hot = spec.hot
    if hot is None:
        return
    problems: list[InputError] = []
    for flag, value in (("--max-total-rank", hot.max_total_rank), ("--max-experts", hot.max_experts)):
        if value is not None and value < 1:
            problems.append(ExportError("is too small", where=flag, got=str(value), need="at least 1"))
    if Mode.DYNAMIC not in spec.modes:
        got = "--mode static"
        problems.append(ExportError("only a dynamic graph has adapters", where="--adapters-as", got=got))
    if spec.site_op is OpChoice.PLUGIN:
        what = "the plugin of a site reads its adapters as weights"
        problems.append(ExportError(what, where="--site-op plugin", got="--adapters-as inputs", fix="--site-op ops"))
    if spec.router is not None and spec.router.kind is not RouterKind.XLORA:
        what, fix = "a router inside the sites is made from its experts", "leave out --router"
        problems.append(ExportError(what, where=f"--router {spec.router.kind}", got="--adapters-as inputs", fix=fix))
    if not spec.adapters and spec.gate is None and not hot.targets:
        what, fix = "without adapters nothing says which modules may be adapted", "--hot-targets all-linear"
        problems.append(ExportError(what, where="--adapters-as inputs", fix=fix))
    if not spec.adapters and spec.gate is None and hot.max_experts is None:
        what = "without adapters nothing says how many experts there may be"
        problems.append(ExportError(what, where="--adapters-as inputs", fix="--max-experts M"))
    raise_all("--adapters-as inputs", problems)


def hot_paths(hot: HotSpec, adapters: AdapterSet, base: BaseDescription) -> tuple[str, ...]:
    """The modules that adapters may change, in module-tree order; refuses what such a bundle cannot hold."""
    problems: list[InputError] = []
    experts, doras = len(adapters.experts), [e.name for e in adapters.experts if e.kind is AdapterKind.DORA]
    ranks = sum(_width(expert) for expert in adapters.experts)
    if ranks > hot.max_total_rank:
        need = f"at least {ranks}, the sum of the experts' largest ranks"
        problems.append(ExportError("is too small", where="--max-total-rank", got=str(hot.max_total_rank), need=need))
    if hot.max_experts is not None and hot.max_experts < experts:
        need = f"at least {experts}, those given"
        problems.append(ExportError("is too small", where="--max-experts", got=str(hot.max_experts), need=need))
    if adapters.gate is not None and hot.max_experts not in (None, experts):
        what = "a gate's experts can be replaced, never added"
        problems.append(ExportError(what, where="--max-experts", got=str(hot.max_experts), need=str(experts)))
    if doras:
        what = "DoRA rescales whole weights, which adapters as inputs cannot do"
        fix = "--adapters-as weights"
        problems.append(
            ExportError(what, where="--adapters-as inputs", got=listed(doras), fix=fix, code="E_UNSUPPORTED")
        )
    touched = {path for expert in adapters.experts for path in expert.deltas}
    wanted = _targeted(hot.targets, base, problems)
    if adapters.gate is not None and adapters.gate.layerwise and (more := sorted(wanted - touched)):
        what = "a layerwise gate has a row of scalings for its own modules only"
        problems.append(ExportError(what, where="--hot-targets", got=listed(more), fix="leave them out"))
    raise_all("--adapters-as inputs", problems)
    return tuple(path for path in base.modules if path in touched | wanted)


def _targeted(targets: Sequence[str], base: BaseDescription, problems: list[InputError]) -> set[str]:
    """What --hot-targets names: all Linear but the head (as PEFT), or modules by name or by the end of their path."""
    kinds = {path: module.kind for path, module in base.modules.items() if module.kind is not ModuleKind.OTHER}
    found: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            linear = (ModuleKind.LINEAR, ModuleKind.CONV1D)
            found |= {path for path, kind in kinds.items() if kind in linear and path.rpartition(".")[2] not in HEADS}
        elif named := {path for path in kinds if is_named([target], path)}:
            found |= named
        else:
            need = "a Linear, Embedding or Conv1D by name or end of its path, or all-linear"
            problems.append(ExportError("names no module of the base", where="--hot-targets", got=target, need=need))
    return found


HEADS = ("lm_head", "embed_out")


def _width(expert: Expert) -> int:
    return max((delta.a.shape[0] for delta in expert.deltas.values()), default=0)


def with_allowed_sites(
    sites: Sequence[Site],
    allowed: Sequence[str],
    kinds: Sequence[tuple[str, object]],
    base: BaseDescription,
    experts: int,
) -> tuple[Site, ...]:
    """All sites that may be adapted; those that no expert touches have no columns yet."""
    known, kind_of = {site.path: site for site in sites}, dict(kinds)
    found = []
    for index, path in enumerate(allowed):
        module = base.modules[path]
        nothing = Site(
            path, kind_of[path], index,  # type: ignore[arg-type]
            torch.zeros(0, module.in_features), torch.zeros(module.out_features, 0), torch.zeros(experts, 0), (), (),
        )  # fmt: skip
        found.append(replace(known.get(path, nothing), index=index))
    return tuple(found)


def hot_info(hot: HotSpec, model: PreTrainedModel, sites: Sequence[Site], experts: int) -> HotInfo:
    """The layout of the inputs: sites that read one tensor share one a."""
    found = [
        HotSite(
            path=site.path,
            kind=site.kind.value,
            in_features=site.a.shape[1],
            out_features=site.b.shape[0],
            group=joined_path([member.path for member in group]),
            place=place,
        )
        for group in grouped_by_input(model, sites)
        for place, site in enumerate(group)
    ]
    return HotInfo(
        max_total_rank=hot.max_total_rank, max_experts=hot.max_experts or experts, path=STACK_PATH, sites=tuple(found)
    )


def initial_stack(hot: HotInfo, adapters: AdapterSet, dtype: str) -> Stack:
    """The given experts side by side, in gate column order."""
    builder = StackBuilder(hot, dtype, sum(_width(expert) for expert in adapters.experts))
    factor = adapters.gate.global_scaling_weight if adapters.gate else 1.0
    for column, expert in enumerate(adapters.experts):
        if expert.deltas:
            builder.put(column, {path: _tensors(delta) for path, delta in expert.deltas.items()}, factor)
    return builder.stack()


def _tensors(delta: LoraDelta) -> LoraTensors:
    return LoraTensors(delta.a.float().numpy(), delta.b.float().numpy(), delta.scale)


def stack_weights(stack: Stack, dtype: str) -> list[Weight]:
    """The stack as the store writes it."""
    found = []
    for name, array in stack.tensors.items():
        tensor = torch.from_numpy(array.copy())
        is_bits = dtype == "bfloat16" and str(array.dtype) == "uint16"
        found.append(weight_from_tensor(name, tensor.view(torch.bfloat16) if is_bits else tensor))
    return found


def probe_adapters(hot: HotInfo, experts: Collection[str]) -> AdapterSet:
    """Seeded random experts on every site that may be adapted: what proves that each input is really read.

    As many as there may be, at most two; their names are none of the given experts'.
    """
    count = min(2, hot.max_experts, hot.max_total_rank)
    rank = min(PROBE_RANK, hot.max_total_rank // count)
    generator = torch.Generator().manual_seed(0)

    def delta(site: HotSite) -> LoraDelta:
        a = torch.randn(rank, site.in_features, generator=generator) / site.in_features**0.5
        if site.kind == "embedding":
            a *= site.in_features**0.5  # looked up, not summed over
        b = torch.randn(site.out_features, rank, generator=generator) * (0.1 / rank**0.5)
        return LoraDelta(a, b, 1.0 + 0.5 * torch.rand(1, generator=generator).item())

    names = [name for name in (f"probe-{number}" for number in range(count + len(experts))) if name not in experts]
    return AdapterSet(
        tuple(Expert(name, {site.path: delta(site) for site in hot.sites}, name, Path()) for name in names[:count]),
        None,
    )
