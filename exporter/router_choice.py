"""Which router a build has: its settings with defaults filled in, what it cannot route, and what it changes first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from pydantic import ValidationError

from exporter.adapters import AdapterSet, Expert, LoraDelta
from exporter.errors import ExportError
from exporter.merges.rank_select import KEEP
from exporter.spec import BuildSpec, OpChoice, RouterSpec
from runtime.adapter_folder.problems import shown
from runtime.errors import InputError, raise_all
from runtime.manifest import AdapterKind, Mode
from runtime.routers import ArrowInfo, RankSelectInfo, RouterInfo, RouterKind

TOP_K, TEMPERATURE, SEED = 3, 1.0, 0  # PEFT's ArrowConfig; it has no default seed and draws another at each start
FLAGS = {
    "keep": "--keep",
    "top_k": "--arrow-top-k",
    "temperature": "--arrow-temperature",
    "seed": "--seed",
    "general": "--arrow-gks",
}
OPTIONS: dict[RouterKind, tuple[str, ...]] = {
    RouterKind.XLORA: (),
    RouterKind.ARROW: ("top_k", "temperature", "seed", "general"),
    RouterKind.RANK_SELECT: ("keep",),
}


def settled_router(spec: BuildSpec, adapters: AdapterSet) -> RouterInfo | None:
    """The router inside the sites of the dynamic graph, None for the gate or none; `adapters` are the routed ones."""
    router = spec.router
    return None if router is None else _info(router, len(adapters.experts))


def _info(router: RouterSpec, experts: int) -> RouterInfo | None:
    if router.kind is RouterKind.XLORA:
        return None
    if router.kind is RouterKind.RANK_SELECT:
        return RankSelectInfo(keep=KEEP if router.keep is None else router.keep)
    return ArrowInfo(
        top_k=min(TOP_K, experts) if router.top_k is None else router.top_k,
        temperature=TEMPERATURE if router.temperature is None else router.temperature,
        seed=SEED if router.seed is None else router.seed,
        general=router.general,
    )


def check_router(spec: BuildSpec) -> None:
    """Refuse settings of a router that contradict each other or the rest of the build."""
    router = spec.router
    if router is None:
        return
    given = [name for name in FLAGS if getattr(router, name) not in (None, ())]
    if stray := [FLAGS[name] for name in given if name not in OPTIONS[router.kind]]:
        need = ", ".join(FLAGS[name] for name in OPTIONS[router.kind]) or "no options"
        raise ExportError(f"{router.kind} has no {', '.join(stray)}", where="--router", need=need)
    if Mode.DYNAMIC not in spec.modes:
        raise ExportError("only the dynamic graph has a router", where="--router", fix="add --mode dynamic")
    if router.kind is RouterKind.XLORA:
        return
    _require_values(router)
    if spec.site_op is OpChoice.PLUGIN:
        raise ExportError(
            "the plugin of the sites has no router in it",
            where="--site-op plugin",
            got=f"--router {router.kind}",
            fix="leave out --site-op plugin",
        )


def _require_values(router: RouterSpec) -> None:
    """Refuse what no manifest may hold: shares and seeds out of their range."""
    try:
        _info(router, TOP_K)
    except ValidationError as error:
        items = error.errors(include_url=False)
        problems: list[InputError] = [
            ExportError(
                "is refused", where=FLAGS[str(item["loc"][0])], got=shown(item["input"]), need=_need(item["msg"])
            )
            for item in items
        ]
        raise_all("--router", problems)


def _need(message: str) -> str:
    """Of pydantic's "Input should be less than 1"."""
    return message.removeprefix("Input should be ")


def routed_adapters(spec: BuildSpec, adapters: AdapterSet) -> tuple[AdapterSet, tuple[str, ...]]:
    """The adapters as the build's router takes them, and what to say of it.

    A router inside the sites takes the place of the gate. Arrow subtracts the mean of general adapters from the others.
    Raises ExportError for experts that the router cannot route, all at once.
    """
    router = spec.router
    if router is None:
        return adapters, ()
    if router.kind is RouterKind.XLORA:
        if adapters.gate is None:
            fix = "give an X-LoRA folder, or --gate DIR"
            raise ExportError("the adapters have no gate", where="--router xlora", fix=fix)
        return adapters, ()
    notes = [] if adapters.gate is None else [f"the gate is left out: --router {router.kind} takes its place"]
    adapters = replace(adapters, gate=None)
    if router.general:
        adapters = without_general(adapters, router.general)
        notes.append(f"the mean of {', '.join(router.general)} is subtracted from every expert")
    raise_all("--router", list(_problems(router, adapters.experts)))
    return adapters, tuple(notes)


def _problems(router: RouterSpec, experts: Sequence[Expert]) -> Iterator[InputError]:
    where = f"--router {router.kind}"
    for expert in experts:
        if expert.kind is AdapterKind.DORA:
            yield ExportError(
                f"{expert.name} is DoRA, whose change is not linear in its weight",
                where=where,
                fix=f"leave {expert.name} out",
                code="E_UNSUPPORTED",
            )
    if router.kind is RouterKind.ARROW and router.top_k is not None and router.top_k > len(experts):
        yield ExportError(
            "more experts than there are", where="--arrow-top-k", got=str(router.top_k), need=f"at most {len(experts)}"
        )


def require_input_vectors(spec: BuildSpec, experts: Sequence[Expert], embeddings: Collection[str]) -> None:
    """Refuse Arrow for experts that adapt an embedding: token ids lie along no prototype (PEFT refuses them, too)."""
    if spec.router is None or spec.router.kind is not RouterKind.ARROW:
        return
    raise_all(
        "--router arrow",
        [
            ExportError(
                f"{expert.name} adapts {path}, which reads token ids: Arrow needs a vector",
                where="--router arrow",
                fix=f"--router rank-select, or train {expert.name} on other modules",
                code="E_UNSUPPORTED",
            )
            for expert in experts
            for path in expert.deltas
            if path in embeddings
        ],
    )


def without_general(adapters: AdapterSet, general: Sequence[str]) -> AdapterSet:
    """General knowledge subtraction (PEFT's use_gks): from a and b of every expert the mean of the general ones'.

    The general adapters are no experts of the result. As in PEFT all have the same modules and ranks.
    """
    known = {expert.name: expert for expert in adapters.experts}
    problems: list[InputError] = [
        ExportError(f"no adapter {name!r}", where="--arrow-gks", need=f"some of {', '.join(known)}")
        for name in general
        if name not in known
    ]
    raise_all("--arrow-gks", problems)
    experts = [expert for expert in adapters.experts if expert.name not in general]
    if not experts:
        raise ExportError("no expert is left", where="--arrow-gks", need="adapters besides the general ones")
    model = known[general[0]]
    raise_all("--arrow-gks", [p for expert in adapters.experts if (p := _unlike(expert, model)) is not None])
    mean = {
        path: (
            torch.stack([known[name].deltas[path].a for name in general]).mean(0),
            torch.stack([known[name].deltas[path].b for name in general]).mean(0),
        )
        for path in model.deltas
    }
    return replace(adapters, experts=tuple(_less(expert, mean) for expert in experts))


def _unlike(expert: Expert, model: Expert) -> InputError | None:
    ranks, wanted = ({path: len(delta.a) for path, delta in each.deltas.items()} for each in (expert, model))
    if ranks == wanted and expert.kind is AdapterKind.LORA and not expert.replacements:
        return None
    paths = sorted(path for path in ranks | wanted if ranks.get(path) != wanted.get(path))
    different = f"another rank or none at {', '.join(paths[:3])}" if paths else f"{expert.kind}"
    return ExportError(
        f"{expert.name} cannot be subtracted from, or from others",
        where="--arrow-gks",
        got=different,
        need=f"LoRA with the modules and ranks of {model.name}",
    )


def _less(expert: Expert, mean: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Expert:
    deltas = {
        path: LoraDelta(delta.a - mean[path][0], delta.b - mean[path][1], delta.scale)
        for path, delta in expert.deltas.items()
    }
    return replace(expert, deltas=deltas)
