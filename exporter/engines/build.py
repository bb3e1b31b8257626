"""The story of an engine build: open the bundle, build each graph's plan, publish them beside it."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from exporter.engines.link import require_link
from exporter.engines.plan import Builder, check_target
from exporter.engines.spec import EngineSpec, plugins_of, profiles_of
from exporter.engines.tensorrt import load_builder
from exporter.errors import ExportError
from exporter.publish import Layout, publish_sealed, stage
from exporter.quantize_targets import require_engine
from exporter.watch import PeakMemory, StageClock, StageEvent
from runtime.bundle import Bundle
from runtime.engines import (
    ENGINE_FORMAT_VERSION,
    EngineFolder,
    EngineManifest,
    PlanFile,
    PlanInfo,
    Target,
    engines_root,
    open_engines,
)
from runtime.errors import UserError
from runtime.gpu import this_gpu
from runtime.manifest import GraphInfo
from runtime.tensorrt import platform_name


def _kind(path: str) -> str:
    if "/" in path or not path.endswith(".plan"):
        raise ExportError(f"an engine folder has no place for {path!a}", code="E_UNLISTED")
    return "plan"


LAYOUT = Layout(_kind, PlanFile, partial(open_engines, check_digests=False))


def build_engines(bundle: Bundle, spec: EngineSpec, clock: StageClock | None = None) -> EngineFolder:
    """Build the engines of `bundle` for one target; what is already there is used as it is, unless `overwrite`.

    Raises ExportError for what TensorRT refuses, MachineError where it, a GPU or disk space is missing. The bundle is
    not touched.
    """
    clock = clock or StageClock()
    graphs = chosen_graphs(bundle, spec)
    require_engine(bundle.manifest.quantization, spec.target)
    for graph in graphs:
        check_target(spec, graph, bundle.manifest.base.dtype)
    trt = load_builder(spec.target)
    planned = planned_manifest(bundle, graphs, spec, trt)
    out = engines_root(bundle.root) / folder_name(planned)
    if not spec.overwrite and (found := sound_engines(out)) is not None:
        clock.notes(f"{out} holds these engines already")
        return found
    if any(plan.plugins for plan in planned.plans):
        require_link(spec.target)
    with PeakMemory() as clock.memory, stage(out, overwrite=True, estimate_bytes=estimate_bytes(bundle)) as staged:
        log: dict[str, list[str]] = {}
        for graph, plan in zip(graphs, planned.plans, strict=True):
            builder = Builder(trt, spec, partial(_tell, clock, graph.name))
            with clock.stage(f"engine {graph.name}", staged.folder):
                log[graph.name] = builder.build(graph, bundle.file(graph.path), plan, staged.folder / plan.path)
        with clock.stage("publish"):
            build_log = {"seconds": clock.seconds, "peak_bytes": clock.memory.as_dict(), "log": log}
            return publish_sealed(staged, planned, LAYOUT, build_log)


def _tell(clock: StageClock, graph: str, text: str) -> None:
    clock.listener(StageEvent(f"{graph}: {text}"))


def chosen_graphs(bundle: Bundle, spec: EngineSpec) -> list[GraphInfo]:
    """The graphs asked for, or all, by name."""
    names = set(spec.graphs) or {graph.name for graph in bundle.manifest.graphs}
    return [bundle.graph(name) for name in sorted(names)]


def planned_manifest(bundle: Bundle, graphs: list[GraphInfo], spec: EngineSpec, trt: Any) -> EngineManifest:
    """The manifest, but for the files."""
    digests = {artifact.path: artifact.sha256 for artifact in bundle.artifacts("graph")}
    encoder = bundle.manifest.encoder
    longest = encoder.max_tokens if encoder else bundle.manifest.base.max_positions
    plans = tuple(
        PlanInfo(
            graph=graph.name,
            onnx_sha256=digests[graph.path],
            path=f"{graph.name}.plan",
            profiles=profiles_of(
                graph, spec, longest, bundle.manifest.hot.max_total_rank if bundle.manifest.hot else 0
            ),
            plugins=plugins_of(graph, spec),
        )
        for graph in graphs
    )
    gpu = this_gpu() if spec.target is Target.TRT else None
    capabilities = (gpu.compute_capability,) if gpu else tuple(sorted(set(spec.compute_capabilities), key=float))
    return EngineManifest(
        format_version=ENGINE_FORMAT_VERSION,
        bundle=bundle.digest,
        target=spec.target,
        version=str(trt.__version__),
        platform=platform_name(),
        compute_capabilities=capabilities,
        device=gpu.name if gpu else "",
        driver=gpu.driver if gpu else "",
        plans=plans,
        artifacts=(),
    )


def folder_name(manifest: EngineManifest) -> str:
    """TARGET-DIGEST, over everything that makes one engine differ from another."""
    data = json.dumps(manifest.model_dump(mode="json", exclude={"artifacts"}), sort_keys=True)
    return f"{manifest.target}-{hashlib.sha256(data.encode()).hexdigest()[:16]}"


def sound_engines(out: Path) -> EngineFolder | None:
    """Engines that lie there already, with right digests."""
    try:
        return open_engines(out) if out.is_dir() else None
    except UserError:
        return None  # damaged: built anew, in its place


def estimate_bytes(bundle: Bundle) -> int:
    """What the plans will take, roughly: each carries its own weights."""
    weights = sum(artifact.size for artifact in bundle.artifacts("weights"))
    return weights * len(bundle.manifest.graphs) + (64 << 20)
