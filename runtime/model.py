"""A bundle opened for use: its graphs in sessions, its tokenizer, and the facts generation needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from plugins.tensorrt_plugins import register
from runtime.adapter_pool import AdapterPool, LoadedAdapter, open_pool
from runtime.asked import settled
from runtime.backends import open_session
from runtime.backends.trt import TrtSession
from runtime.bundle import Bundle, open_bundle
from runtime.engines import Target, fitting_engine
from runtime.errors import InputError
from runtime.fold import Folding, folding_for
from runtime.manifest import GraphInfo, Manifest, Mode, OnnxRuntimeForm, Task, VariantInfo
from runtime.session import SessionSettings, SlotSession
from runtime.tensorrt import load_tensorrt, this_machine
from runtime.text import Text, text_of


@dataclass(slots=True)
class Turn:
    """Whose caches the sessions hold now: one generation at a time."""

    holder: object = None
    session: SlotSession | None = None  # of its caches

    def begin(self, session: SlotSession) -> None:
        """Nobody's, until a holder is set. What another session holds goes: it would keep old adapters alive."""
        self.holder = None
        if self.session is not None and self.session is not session:
            self.session.allocate(0)
        self.session = session


@dataclass(frozen=True, slots=True)
class Model:
    """A context manager; `generate` and `complete` take it."""

    manifest: Manifest
    graph: GraphInfo  # of requests that name no variant
    session: SlotSession  # of that graph
    text: Text | None  # None: token ids only
    open_graph: Callable[[GraphInfo, Mapping[str, NDArray[Any]]], SlotSession]  # with these in place of stored weights
    bundle: Bundle
    backend: str
    others: dict[str, SlotSession] = field(default_factory=dict)  # by graph, opened when first asked for
    foldings: dict[str, Folding] = field(default_factory=dict)  # by graph, found when first asked for
    turn: Turn = field(default_factory=Turn)
    adapters: AdapterPool | None = None  # where the dynamic graph's adapters are inputs

    @property
    def vocab_size(self) -> int:
        """Token ids are 0..vocab_size-1."""
        return self.manifest.base.vocab_size

    @property
    def max_positions(self) -> int:
        """How many tokens a sequence may hold: the model's positions, or fewer where an engine was built for fewer."""
        return self.session.limits.positions

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens with which the model ends a text."""
        return frozenset(self.manifest.base.eos_token_ids)

    def folding_of(self, graph: str) -> Folding:
        """How mixes of this graph's experts are folded into the weights of one without; InputError if they cannot."""
        if self.backend != "ort":
            raise InputError(
                "only ONNX Runtime takes weights at run time", where="decode folded", got=self.backend,
                need="the backend ort", fix="decode frozen", code="E_DECODE",
            )  # fmt: skip
        if graph not in self.foldings:
            [info] = (info for info in self.manifest.graphs if info.name == graph)
            self.foldings[graph] = folding_for(self.bundle, info)
        return self.foldings[graph]

    def session_of(self, graph: str) -> SlotSession:
        """The session of the graph of this name. The weights they share lie in memory once: files are mapped."""
        if graph == self.graph.name:
            return self.session
        if graph not in self.others:
            [info] = (info for info in self.manifest.graphs if info.name == graph)
            self.others[graph] = self.open_graph(info, {})
        return self.others[graph]

    def open_folded(self, folding: Folding, scalings: NDArray[np.float32]) -> SlotSession:
        """A new session without experts, this mix [G, E] in its weights; whoever asks for it closes it."""
        return self.open_graph(folding.plain, folding.weights(scalings))

    def load_adapter(self, alias: str, folder: str | Path) -> LoadedAdapter:
        """Load a PEFT LoRA folder under a new name; requests begun from now on may name it. From any thread."""
        return self.require_adapters().load(alias, folder)

    def replace_adapter(self, alias: str, folder: str | Path) -> LoadedAdapter:
        """Another adapter under a loaded name; running requests keep the one they began with. From any thread."""
        return self.require_adapters().replace(alias, folder)

    def unload_adapter(self, alias: str) -> None:
        """Take an adapter away; running requests keep it until they end. From any thread."""
        self.require_adapters().unload(alias)

    def require_adapters(self) -> AdapterPool:
        """What `load_adapter` and its kin change; InputError where the adapters are weights."""
        if self.adapters is None:
            raise InputError(
                "the adapters of this bundle are weights and cannot change",
                fix="build it with --adapters-as inputs --max-total-rank N", code="E_ADAPTER",
            )  # fmt: skip
        return self.adapters

    def close(self) -> None:
        """Free the sessions."""
        for session in (self.session, *self.others.values()):
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    path: str | Path,
    *,
    backend: str = "ort",
    graph: str | None = None,
    variant: str | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    max_adapter_bytes: int | None = None,
    portable: bool = False,
) -> Model:
    """Open a bundle for generation. `graph` is a graph's name or mode; without it the dynamic one is taken.

    Graphs of other variants are opened when a request first names one; with `variant` its graph is opened now, in
    place of the dynamic one.
    `max_adapter_bytes`: of all adapters in memory, where they are inputs, those of running requests included.
    `portable`: run the portable graphs even where this backend has a form of its own.
    `backend`: ort, or trt and trt-rtx with an engine that lies beside the bundle and fits this machine.
    """
    threads, path = settled("threads", threads, int | None), settled("path", path, Path)
    graph, variant = settled("graph", graph, str | None), settled("variant", variant, str | None)
    backend, provider = settled("backend", backend, str), settled("provider", provider, str)
    max_adapter_bytes = settled("max_adapter_bytes", max_adapter_bytes, int | None)
    if threads is not None and threads < 1:
        raise InputError("threads", got=str(threads), need="at least 1")
    bundle = open_bundle(Path(path))
    require_task(bundle, Task.TEXT_GENERATION)
    pool = open_pool(bundle, max_adapter_bytes)
    if pool is None and max_adapter_bytes is not None:
        raise InputError("no adapters are loaded into this bundle: they are weights", where="max_adapter_bytes",
                         got=str(max_adapter_bytes), fix="leave it out", code="E_ADAPTER")  # fmt: skip
    is_listed = pool is None or any(known.name == variant for known in bundle.manifest.variants)
    if variant is not None and is_listed:  # else the name of an adapter that is still to be loaded
        graph = variant_named(bundle.manifest, variant).graph
    info = pick_graph(bundle, graph)
    quantization = bundle.manifest.quantization
    settings = SessionSettings(bundle.manifest.base.max_positions, provider, threads, quantization=quantization)
    text = text_of(bundle)

    def open_graph(info: GraphInfo, weights: Mapping[str, NDArray[Any]]) -> SlotSession:
        if backend in tuple(Target):
            return engine_session(bundle, info, Target(backend), settings)
        form = info if portable else form_for(info, backend, provider)
        its = replace(settings, weights=weights)
        return open_session(backend, bundle.file(form.path), form.signature, its)

    return Model(bundle.manifest, info, open_graph(info, {}), text, open_graph, bundle, backend, adapters=pool)


def form_for(graph: GraphInfo, backend: str, provider: str) -> GraphInfo | OnnxRuntimeForm:
    """What of a graph this backend opens: ONNX Runtime's CPU provider has a form of its own in most bundles."""
    is_own = backend == "ort" and provider == "cpu" and graph.onnxruntime is not None
    return graph.onnxruntime if is_own and graph.onnxruntime is not None else graph


def engine_session(bundle: Bundle, graph: GraphInfo, target: Target, settings: SessionSettings) -> SlotSession:
    """Package, driver, fingerprint, digest: only then does TensorRT see the engine."""
    if settings.provider != "cpu":
        raise InputError("providers are ONNX Runtime's", got=settings.provider, fix=f"leave it out with {target}")
    trt = load_tensorrt(target)
    engines, plan = fitting_engine(bundle, graph.name, this_machine(target, trt))
    plugins = partial(register, names=plan.plugins) if plan.plugins else None
    return TrtSession(engines.read(plan.path), graph.signature, settings, plan.profiles, target, plugins)


COMMANDS = {  # task -> the command that runs it
    Task.TEXT_GENERATION: "generate",
    Task.FEATURE_EXTRACTION: "embed",
    Task.TEXT_CLASSIFICATION: "classify",
}


def require_task(bundle: Bundle, *tasks: Task) -> None:
    """Refuse a bundle that is for something else."""
    task = bundle.manifest.task
    if task not in tasks:
        raise InputError(
            "this bundle is for another task",
            where=str(bundle.root),
            got=task.value,
            need=" or ".join(tasks),
            fix=f"python -m runtime {COMMANDS[task]} BUNDLE …",
            code="E_TASK",
        )


def variant_named(manifest: Manifest, name: str) -> VariantInfo:
    """The variant of this name."""
    for variant in manifest.variants:
        if variant.name == name:
            return variant
    have = ", ".join(variant.name for variant in manifest.variants) or "none; this bundle was built without"
    raise InputError(f"no variant {name!r}", need=f"one of: {have}", code="E_VARIANT")


def pick_graph(bundle: Bundle, wanted: str | None) -> GraphInfo:
    """The graph of that name, else the first of that mode; without a wish the first dynamic one, else the first."""
    graphs = bundle.manifest.graphs
    named = [graph for graph in graphs if graph.name == wanted]
    moded = [graph for graph in graphs if graph.mode == (wanted or Mode.DYNAMIC)]
    found = named or moded or (list(graphs) if wanted is None else [])
    if not found:
        have = ", ".join(f"{graph.name} ({graph.mode})" for graph in graphs) or "none"
        raise InputError(f"no graph {wanted!r}", where=str(bundle.root), need=f"one of: {have}", code="E_GRAPH")
    return found[0]
