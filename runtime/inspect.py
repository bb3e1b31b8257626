"""What a bundle is, as text for people: `python -m runtime inspect BUNDLE`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from runtime.bundle import Bundle
from runtime.defaults import said
from runtime.engines import PlanInfo, engine_folders, open_engines
from runtime.errors import UserError
from runtime.manifest import (
    AdapterKind,
    ExpertInfo,
    GateInfo,
    GenerationDefaults,
    GraphInfo,
    HotInfo,
    Manifest,
    MergeInfo,
    MergeMethod,
    VariantInfo,
    VariantKind,
    VerifyLevel,
    VerifyReport,
)
from runtime.quantization import quantization_text
from runtime.routers import RouterInfo
from runtime.sealed_folder import manifest_bytes

_NOT_VERIFIED = "NOT VERIFIED"


def render(bundle: Bundle) -> str:
    """The bundle in a screen or two: what it holds, how it was verified, how large it is, what made it."""
    manifest = bundle.manifest
    sections = [
        [f"{manifest.name}  (bundle {bundle.digest[:12]}, format {manifest.format_version})", f"  {bundle.root}"],
        _table("base", _base(manifest)),
        *([_table("generation config of the base", _generation(manifest.generation))] if manifest.generation else []),
        ["experts: column -> name -> folder", *_experts(manifest)] if manifest.experts else ["experts: none"],
        _table("sites", _sites(manifest)),
        *([_table("adapters as inputs", _hot(manifest.hot))] if manifest.hot else []),
        _table("gate", _gate(manifest.gate)) if manifest.gate else ["gate: none"],
        *(
            [_table("quantised", [("weights", quantization_text(manifest.quantization))])]
            if manifest.quantization
            else []
        ),
        ["graphs", *(f"  {_graph(graph)}" for graph in manifest.graphs)],
        _table("variants", ((variant.name, _variant(manifest, variant)) for variant in manifest.variants)),
        ["verification", *(line for graph in manifest.graphs for line in _verification(manifest, graph.name))],
        _table("sizes", _sizes(bundle)),
        _table("engines, beside the bundle", _engines(bundle)),
        _table("made with", sorted(manifest.versions.items())),
    ]
    return "\n".join(printable(line) for section in sections for line in section) + "\n"


def render_json(bundle: Bundle) -> str:
    """The manifest as it is written."""
    return manifest_bytes(bundle.manifest).decode()


def verification_of(manifest: Manifest, graph: str) -> str:
    """One line: how far this graph was verified. `structure` compared no numbers and is never called verified."""
    report = next((report for report in manifest.reports if report.graph == graph), None)
    if report is None:
        return f"{_NOT_VERIFIED} (no report)"
    if report.level is VerifyLevel.STRUCTURE or not report.checks:
        proved = f"; proved: {report.proof}" if report.level is VerifyLevel.STRUCTURE else ""
        return f"{_NOT_VERIFIED} (level {report.level}: no numbers of this model were compared{proved})"
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        return f"{_NOT_VERIFIED} (level {report.level}: failed {', '.join(failed)})"
    return f"verified, level {report.level} ({report.proof}), stage {report.stage}; stage B: {report.stage_b}"


def printable(line: str) -> str:
    """A manifest's texts may come from anyone: no line breaks or terminal codes reach the screen."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = [(key, text) for key, text in rows]
    width = max((len(key) for key, _ in rows), default=0)
    return [title, *(f"  {key:<{width}}  {text}" for key, text in rows)]


def _base(manifest: Manifest) -> Iterator[tuple[str, str]]:
    base, encoder = manifest.base, manifest.encoder
    yield "name", f"{base.name} ({base.model_type}, {base.dtype})"
    yield "size", f"{base.blocks} blocks, hidden {base.hidden_size}, vocabulary {base.vocab_size}"
    yield "context", f"{base.max_positions} positions"
    if encoder is not None:
        yield "task", f"{manifest.task}, texts of up to {encoder.max_tokens} tokens"
    if encoder is not None and encoder.pooling is not None:
        yield "embeddings", f"{encoder.pooling} pooling" + (", normalised to length 1" if encoder.normalize else "")
    if encoder is not None and encoder.labels:
        shown = ", ".join(encoder.labels[:8]) + (", …" if len(encoder.labels) > 8 else "")
        yield "labels", f"{len(encoder.labels)}: {shown}; scores: {encoder.scores}"


def _generation(defaults: GenerationDefaults) -> Iterator[tuple[str, str]]:
    yield "applied", said(defaults) or "nothing"
    if defaults.not_applied:
        yield "NOT APPLIED", ", ".join(f"{name} {value}"[:80] for name, value in sorted(defaults.not_applied.items()))


def _experts(manifest: Manifest) -> list[str]:
    width = max(len(expert.name) for expert in manifest.experts)
    return [
        f"  {expert.column:>3} -> {expert.name:<{width}} -> {expert.folder}  ({_expert(expert)})"
        for expert in manifest.experts
    ]


def _expert(expert: ExpertInfo) -> str:
    kind = "" if expert.kind is AdapterKind.LORA else f"{expert.kind}, "
    alone = "; alone or not at all" if expert.kind is AdapterKind.DORA else ""
    return f"{kind}rank {expert.rank}, {expert.sites} sites{alone}"


def _sites(manifest: Manifest) -> Iterator[tuple[str, str]]:
    kinds = sorted({site.kind for site in manifest.sites})
    yield "count", str(len(manifest.sites))
    for kind in kinds:
        yield kind, str(sum(site.kind == kind for site in manifest.sites))


def _hot(hot: HotInfo) -> Iterator[tuple[str, str]]:
    """What a running session may load."""
    yield "limits", f"{hot.max_experts} experts, {hot.max_total_rank} rank columns together"
    for site in hot.sites:
        yield site.path, f"{site.kind} {site.in_features} -> {site.out_features}"


def _gate(gate: GateInfo) -> Iterator[tuple[str, str]]:
    yield "kind", f"depth {gate.depth}, {'one row per site' if gate.layerwise else 'one row shared by all sites'}"
    yield "softmax", f"temperature {gate.temperature:g}" if gate.softmax else "none"
    if gate.top_k is not None:
        over = f", softmax over the kept per {gate.topk_softmax}" if gate.softmax_topk else ""
        yield "top-k", f"{gate.top_k}{over}"
    yield "scaling pass", f"value {gate.scaling_pass_value:g}; global weight {gate.global_scaling_weight:g}"


def _variant(manifest: Manifest, variant: VariantInfo) -> str:
    """What a request that names it gets."""
    if variant.kind is VariantKind.GATE:
        return "the gate, token by token"
    if variant.kind is VariantKind.ROUTER:
        return "the router inside the sites, token by token and site by site, in one pass; the default"
    if variant.mix is not None:
        own = f"; weights of their own at {len(variant.mix.sites)} sites" if variant.mix.sites else ""
        return f"{_shares(variant.mix.weights)}{own}"
    return f"folded into the weights of graph {variant.graph}, a session of its own"


def _shares(mix: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={share:g}" for name, share in mix.items()) or "the base alone"


def _graph(graph: GraphInfo) -> str:
    own = f"{len(graph.mix_sites)} modules' own weights" if graph.mix_sites else ""
    parts = [_shares(graph.mix or {})] if graph.mix or not own else []
    mix = "" if graph.mix is None else f" of {' and '.join([*parts, *filter(None, [own])])}{_merge(graph.merge)}"
    cache = graph.signature.cache_style
    ours = f", operators {' and '.join(graph.plugins)}" if graph.plugins else ""
    router = "" if graph.router is None else f", {_router(graph.router)}"
    form = "" if graph.onnxruntime is None else f", also for ONNX Runtime as {graph.onnxruntime.path}"
    return f"{graph.name}: {graph.mode}{mix}, {graph.emit}, opset {graph.opset}, K/V cache {cache}{router}{ours}{form}"


def _router(router: RouterInfo) -> str:
    """The router inside the sites, with its settings."""
    if router.kind == "rank-select":
        return f"router rank-select, keep {router.keep:g}"
    general = f", less the mean of {' and '.join(router.general)}" if router.general else ""
    return f"router arrow, top {router.top_k}, temperature {router.temperature:g}, seed {router.seed}{general}"


def _merge(merge: MergeInfo | None) -> str:
    """The method and its options, where it is not the plain sum."""
    if merge is None or merge.method is MergeMethod.LINEAR:
        return ""
    options = merge.model_dump(exclude={"method"}, exclude_none=True)
    return f", merged by {merge.method}" + "".join(f", {name} {value:g}" for name, value in options.items())


def _verification(manifest: Manifest, graph: str) -> Iterator[str]:
    yield f"  {graph}: {verification_of(manifest, graph)}"
    for report in manifest.reports:
        if report.graph == graph and report.checks:
            yield from _checks(report)


def _checks(report: VerifyReport) -> Iterator[str]:
    work = f"{report.prompts} prompts, {report.prefill_positions} prefill positions, {report.decode_steps} decode steps"
    yield f"    {work}; the adapters change logits by up to {report.adapters_matter:.3g}"
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        word = "ok  " if check.passed else "FAIL"
        where = f"  at {check.where}" if check.where else ""
        yield f"    {word} {check.name:<{width}}  {check.value:.3g} (limit {check.limit:.3g}){where}"
    if report.loss is not None:
        loss = report.loss
        yield (
            f"    quantised against unquantised: mean KL divergence {loss.kld:.3g} (limit {loss.kld_limit:g}), same "
            f"most likely token {loss.same_top:.2%} (limit {loss.same_top_limit:.0%}), {loss.positions} positions"
        )


def _sizes(bundle: Bundle) -> Iterator[tuple[str, str]]:
    artifacts = bundle.manifest.artifacts
    for kind in dict.fromkeys(artifact.kind for artifact in artifacts):
        files = bundle.artifacts(kind)
        word = "file" if len(files) == 1 else "files"
        yield kind, f"{_size(sum(file.size for file in files))} in {len(files)} {word}"
    yield "total", _size(sum(artifact.size for artifact in artifacts))


def _engines(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Each engine folder, whether or not this machine could run it; only the manifest is read."""
    for path in engine_folders(bundle.root):
        try:
            manifest = open_engines(path, check_digests=False).manifest
        except UserError as error:
            yield path.name, f"refused: {error}"
            continue
        graphs = ", ".join(_plan(plan) for plan in manifest.plans)
        gpus = ", ".join(manifest.compute_capabilities) or "8.0 and later"
        size = _size(sum(file.size for file in manifest.artifacts))
        stale = "" if manifest.bundle == bundle.digest else "; of ANOTHER BUILD of this bundle"
        what = f"{manifest.target.product} {manifest.version} on {manifest.platform}"
        yield path.name, f"{graphs}: {what}, compute capability {gpus}, {size}{stale}"


def _plan(plan: PlanInfo) -> str:
    return f"{plan.graph} (plugins {' and '.join(plan.plugins)})" if plan.plugins else plan.graph


def _size(count: int) -> str:
    """Decimal units with three digits: 999 B, 1.23 kB, 45.6 MB."""
    value, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.5 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"
