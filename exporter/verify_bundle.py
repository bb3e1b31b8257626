"""`python -m exporter verify`: is this bundle still the model? Alone by its golden set, with sources by all checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import VerifyError
from exporter.spec import BuildSpec
from runtime.adapter_pool import stored_stack
from runtime.backends import open_session
from runtime.bundle import Bundle, open_bundle
from runtime.encode_golden import read_encoded, replay_encoded
from runtime.encoder_session import EncoderSession
from runtime.errors import MachineError
from runtime.golden import GOLDEN_PATH, GoldenCase, read_golden, replay_golden
from runtime.manifest import Check, EncoderInfo, GraphInfo, OnnxRuntimeForm
from runtime.session import SessionSettings


@dataclass(frozen=True, slots=True)
class GraphChecks:
    """What was compared for one graph."""

    graph: str
    against: str  # "golden set" | "reference forward"
    checks: tuple[Check, ...]


def verify_bundle(path: Path, sources: BuildSpec | None = None, *, threads: int | None = None) -> list[GraphChecks]:
    """All digests; then the golden set, and with `sources` (base and adapters) their digests and every stage A check.

    The golden set of an fp16 or bf16 bundle is left to a GPU (stage B): the CPU runs no bf16 and proves no fp16.
    Raises VerifyError when a measure fails or nothing can be measured, InputError when the bundle is damaged.
    """
    bundle = open_bundle(path)
    dtype = bundle.manifest.base.dtype
    if dtype != "float32" and sources is None:
        raise MachineError(
            f"the numbers of a {dtype} bundle cannot be checked on the CPU (its digests are right)",
            where=str(path),
            fix="give --base and --adapters: its fp32 twin is verified and its weights must be the twin's rounded",
            code="E_GPU",
        )
    results = replay_bundle(bundle, threads) if dtype == "float32" else []
    if sources is not None:
        from exporter.verify_sources import verify_against_sources  # needs torch

        found = verify_against_sources(bundle, sources)
        results += [GraphChecks(graph, "reference forward", checks) for graph, checks in found.items()]
    failed = [(result, check) for result in results for check in result.checks if not check.passed]
    if failed:
        raise VerifyError(
            "; ".join(
                f"graph {r.graph}, {c.name} {c.value:.3g} > {c.limit:g} against the {r.against} ({c.where})"
                for r, c in failed
            ),
            where=str(path),
            code="E_VERIFY",
        )
    if not any(result.checks for result in results):
        raise VerifyError(
            "nothing to verify: the bundle was built with --verify structure, which proved a small twin of the model, "
            "and holds no golden set of the model itself",
            where=str(path),
            fix="give --base and --adapters, or build again with --verify quick",
        )
    return results


def replay_bundle(bundle: Bundle, threads: int | None) -> list[GraphChecks]:
    """Every golden case of every graph; needs numpy and a backend, no torch."""
    if bundle.manifest.encoder is not None:
        return replay_encoder(bundle, bundle.manifest.encoder, threads)
    if not any(artifact.path == GOLDEN_PATH for artifact in bundle.manifest.artifacts):
        return []
    golden = read_golden(bundle.read(GOLDEN_PATH), str(bundle.root / GOLDEN_PATH))
    results = []
    for graph in bundle.manifest.graphs:
        cases = [case for case in golden.cases if case.graph == graph.name]
        if not cases:
            raise VerifyError("the golden set has no case of this graph", where=f"graph {graph.name}", code="E_VERIFY")
        results.append(GraphChecks(graph.name, "golden set", replay_graph(bundle, graph, cases, threads)))
    return results


def replay_encoder(bundle: Bundle, encoder: EncoderInfo, threads: int | None) -> list[GraphChecks]:
    """The same for an encoder: each graph's texts as one batch."""
    golden, results = read_encoded(bundle), []
    for graph in bundle.manifest.graphs if golden else ():
        cases = [case for case in golden if case.graph == graph.name]
        if not cases:
            raise VerifyError("the golden set has no case of this graph", where=f"graph {graph.name}", code="E_VERIFY")
        settings = SessionSettings(encoder.max_tokens, threads=threads)
        session = EncoderSession(bundle.file(graph.path), graph.signature, settings)
        try:
            results.append(GraphChecks(graph.name, "golden set", replay_encoded(session, cases)))
        finally:
            session.close()
    return results


def replay_graph(
    bundle: Bundle, graph: GraphInfo, cases: Sequence[GoldenCase], threads: int | None
) -> tuple[Check, ...]:
    """One graph's cases, in a fresh session of each of its forms; of each check the worse."""
    found = [replay_form(bundle, graph, form, cases, threads) for form in (graph, graph.onnxruntime) if form]
    return tuple(max(checks, key=lambda check: check.value - check.limit) for checks in zip(*found, strict=True))


def replay_form(
    bundle: Bundle,
    graph: GraphInfo,
    form: GraphInfo | OnnxRuntimeForm,
    cases: Sequence[GoldenCase],
    threads: int | None,
) -> tuple[Check, ...]:
    """The graph's cases in one of its forms; places name the form."""
    manifest = bundle.manifest
    settings = SessionSettings(manifest.base.max_positions, threads=threads, quantization=manifest.quantization)
    session = open_session("ort", bundle.file(form.path), form.signature, settings)
    try:
        checks = replay_golden(session, cases, bundle.manifest.base.dtype, stored_stack(bundle, graph))
    finally:
        session.close()
    return (
        checks
        if form is graph
        else tuple(
            check.model_copy(update={"where": f"{check.where}, in {form.path}" if check.where else ""})
            for check in checks
        )
    )
