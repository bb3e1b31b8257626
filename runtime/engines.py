"""TensorRT engines of a bundle: sealed folders BUNDLE.engines/TARGET-DIGEST, tied to the bundle and to a machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from plugins.operators import OPERATORS
from runtime.bundle import Bundle
from runtime.errors import InputError, MachineError, UserError
from runtime.manifest import MANIFEST_NAME, Digest, ListedFile, Listing, RelativePath, Strict
from runtime.sealed_folder import SealedFolder, parse_manifest, read_sealed

ENGINE_FORMAT_VERSION = 1
SYMBOLS = ("B", "S", "C", "K", "R")
_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")
_FOLDER = re.compile(r"(trt|trt-rtx)-[0-9a-f]{16}")


class Target(StrEnum):
    """Who builds and runs the engines."""

    TRT = "trt"
    TRT_RTX = "trt-rtx"

    @property
    def product(self) -> str:
        """The vendor's name."""
        return {"trt": "TensorRT", "trt-rtx": "TensorRT for RTX"}[self.value]

    @property
    def module(self) -> str:
        """The Python package; both share one API."""
        return {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}[self.value]


class Range(Strict):
    """Sizes of one symbol in an optimisation profile."""

    min: int
    opt: int
    max: int


class ProfileInfo(Strict):
    """One optimisation profile; its place in the list is its index in the engine."""

    name: Literal["prefill", "decode", "whole", "encoder"]
    ranges: dict[str, Range]  # by symbol of the signature: B, S, C, K, R; an encoder's are B and S


class PlanInfo(Strict):
    """The engine of one graph. It carries its own copy of the weights."""

    graph: str
    onnx_sha256: Digest
    path: RelativePath
    profiles: tuple[ProfileInfo, ...]
    plugins: tuple[str, ...] = ()  # that must be registered before the plan is deserialised


class PlanFile(ListedFile):
    """A file of an engine folder."""

    kind: Literal["plan"]


class EngineManifest(Listing):
    """What an engine folder states of itself."""

    bundle: Digest  # of the bundle the engines were built from
    target: Target
    version: str  # TensorRT's
    platform: str  # "linux-x86_64"
    compute_capabilities: tuple[str, ...]  # "8.6"; none: 8.0 and later (TensorRT for RTX only)
    device: str  # the GPU built on; empty: built without one
    driver: str  # its driver's CUDA, "13.0"; empty: built without one
    plans: tuple[PlanInfo, ...]
    artifacts: tuple[PlanFile, ...]


@dataclass(frozen=True, slots=True, eq=False)
class EngineFolder(SealedFolder[EngineManifest]):
    """An opened engine folder."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where an engine is to run."""

    target: Target
    version: str
    platform: str
    compute_capability: str  # "8.6"
    device: str  # the GPU's name
    driver: str  # the driver's CUDA, "13.0"


def engines_root(bundle: Path) -> Path:
    """The folder beside the bundle that holds its engines; the bundle itself is never changed."""
    return bundle.parent / f"{bundle.name}.engines"


def engine_folders(bundle: Path) -> list[Path]:
    """The engine folders of a bundle, sorted; nothing is opened."""
    root = engines_root(bundle)
    found = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in found if _FOLDER.fullmatch(path.name) and (path / MANIFEST_NAME).is_file())


def open_engines(path: Path, *, check_digests: bool = True) -> EngineFolder:
    """Check an engine folder against the whole format and open it; nothing is deserialised."""
    return EngineFolder(path, *read_sealed(path, read_engine_manifest, check_digests=check_digests))


def read_engine_manifest(data: bytes, where: str = MANIFEST_NAME) -> EngineManifest:
    """Parse and check a manifest; an InputError names every fault found."""
    return parse_manifest(EngineManifest, ENGINE_FORMAT_VERSION, data, where, contradictions)


def _needed(profile: ProfileInfo) -> set[str]:
    return {"B", "S"} if profile.name == "encoder" else {"B", "S", "K"}


def contradictions(manifest: EngineManifest) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) wherever one part of the manifest contradicts another."""
    paths = [file.path for file in manifest.artifacts]
    if [plan.path for plan in manifest.plans] != paths or not paths:
        yield "plans", "need one listed file each, in the same order"
    if len({plan.graph for plan in manifest.plans}) < len(manifest.plans):
        yield "plans", "name a graph twice"
    if any(not is_capability(text) for text in manifest.compute_capabilities):
        yield "compute_capabilities", "are written like 8.6"
    for plan in manifest.plans:
        if unknown := sorted(set(plan.plugins) - set(OPERATORS)):
            yield f"plans.{plan.graph}.plugins", f"names {', '.join(unknown)}; this version has {', '.join(OPERATORS)}"
        if not plan.profiles or any(not _needed(profile) <= profile.ranges.keys() for profile in plan.profiles):
            yield f"plans.{plan.graph}", "needs profiles with ranges for B, S and K at least"
        for profile in plan.profiles:
            wrong = [
                symbol for symbol, r in profile.ranges.items()
                if symbol not in SYMBOLS or not 0 <= r.min <= r.opt <= r.max
            ]  # fmt: skip
            if wrong:
                yield f"plans.{plan.graph}.{profile.name}", f"has no sound range for {', '.join(wrong)}"


def misfits(manifest: EngineManifest, bundle: Bundle, machine: Machine) -> list[str]:
    """Why these engines may not be deserialised here: both sides of everything that differs."""
    graphs = {graph.name: graph.path for graph in bundle.manifest.graphs}
    digests = {artifact.path: artifact.sha256 for artifact in bundle.artifacts("graph")}
    pairs = {
        "bundle": (manifest.bundle, bundle.digest),
        "target": (manifest.target, machine.target),
        f"{machine.target.product} version": (manifest.version, machine.version),
        "platform": (manifest.platform, machine.platform),
        "GPU": (manifest.device, machine.device if manifest.device else ""),
        "driver's CUDA": (manifest.driver, machine.driver if manifest.driver else ""),
        **{
            f"ONNX file of graph {plan.graph}": (plan.onnx_sha256, digests.get(graphs.get(plan.graph, ""), "none"))
            for plan in manifest.plans
        },
    }
    found = [
        f"{name}: the engine's is {theirs}, here it is {ours}"
        for name, (theirs, ours) in pairs.items()
        if theirs != ours
    ]
    if not runs_on(manifest, machine.compute_capability):
        wanted = ", ".join(manifest.compute_capabilities) or "8.0 and later"
        found.append(f"compute capability: the engine's is {wanted}, here it is {machine.compute_capability}")
    return found


def is_capability(text: str) -> bool:
    """Whether it is written like 8.6."""
    return _CAPABILITY.fullmatch(text) is not None


def runs_on(manifest: EngineManifest, capability: str) -> bool:
    """Whether a GPU of this compute capability is among the engine's."""
    if manifest.compute_capabilities:
        return capability in manifest.compute_capabilities
    return float(capability) >= 8.0


def fixed_capacity(profiles: Sequence[ProfileInfo]) -> int | None:
    """C where all profiles take just one, as TensorRT wants of graphs that write their caches themselves."""
    ranges = [profile.ranges["C"] for profile in profiles if "C" in profile.ranges]
    sizes = {size for r in ranges for size in (r.min, r.max)}
    return sizes.pop() if len(sizes) == 1 and len(ranges) == len(profiles) else None


def require_fit(engines: EngineFolder, bundle: Bundle, machine: Machine) -> None:
    """Refuse engines of another bundle, version or GPU, before a byte of them is deserialised."""
    if found := misfits(engines.manifest, bundle, machine):
        raise MachineError(
            "the engine was not built for this: " + "; ".join(found),
            where=str(engines.root),
            fix=build_command(bundle, machine.target),
            code="E_ENGINE",
        )


def fitting_engine(bundle: Bundle, graph: str, machine: Machine) -> tuple[EngineFolder, PlanInfo]:
    """The bundle's first engine of this graph that fits the machine; else a MachineError says why each does not.

    Digests of plans are left to whoever reads one (`EngineFolder.read`), so that the bytes hashed are those used.
    """
    refusals = []
    for path in engine_folders(bundle.root):
        if path.name.rpartition("-")[0] != machine.target:
            continue
        try:
            engines = open_engines(path, check_digests=False)
            require_fit(engines, bundle, machine)
        except UserError as error:
            refusals.append(error)
            continue
        plans = [plan for plan in engines.manifest.plans if plan.graph == graph]
        if plans:
            return engines, plans[0]
        refusals.append(InputError(f"holds no engine of graph {graph}", where=str(path)))
    if len(refusals) == 1 and isinstance(refusals[0], MachineError):
        raise refusals[0]
    raise MachineError(
        f"there is no engine of graph {graph} for {machine.target.product} on this machine",
        where=str(bundle.root),
        got="".join(f"\n  - {error}" for error in refusals) + "\n" if refusals else "none at all",
        fix=build_command(bundle, machine.target),
        code="E_ENGINE",
    )


def build_command(bundle: Bundle, target: Target) -> str:
    """What builds the right engine."""
    return f"python -m exporter engine {bundle.root} --target {target}"
