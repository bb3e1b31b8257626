"""What must hold between the parts of a manifest, beyond each part being well formed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from runtime.adapter_inputs import adapter_inputs, stack_specs
from runtime.manifest import (
    BUILD_LOG_NAME,
    MANIFEST_NAME,
    SEAL_NAME,
    GraphInfo,
    ListedFile,
    Manifest,
    MixInfo,
    Mode,
    Task,
    VariantInfo,
    VariantKind,
)
from runtime.safe_files import MAX_FILES, collisions, path_problem
from runtime.signature import EMBEDDINGS, GATE, LENGTHS, LOGITS, ROUTER, SCALINGS, CacheStyle, in_style

_GIB = 1 << 30
MAX_BYTES = {
    "graph": 2 * _GIB,
    "weights": 512 * _GIB,
    "tokenizer": _GIB // 4,
    "golden": _GIB // 4,
    "plan": 512 * _GIB,
}
MAX_TOTAL_BYTES = 1024 * _GIB
_RESERVED = {MANIFEST_NAME, SEAL_NAME, BUILD_LOG_NAME}


def listing_problems(files: Sequence[ListedFile]) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of every listed path that may not be listed. Runs before any of them is touched."""
    paths = [artifact.path for artifact in files]
    for path in paths:
        problem = path_problem(path)
        if problem:
            yield path, problem
        elif path.lower() in _RESERVED:
            yield path, "is the format's own file and is never listed"
    for path in collisions(paths):
        yield path, "collides with another listed path (same name, same but for case, or file and folder)"


def size_problems(files: Sequence[ListedFile]) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of listings that are too large to be what they say."""
    if len(files) > MAX_FILES:
        yield "artifacts", f"lists {len(files)} files, at most {MAX_FILES} are allowed"
    for artifact in files:
        if artifact.size > MAX_BYTES[artifact.kind]:
            yield artifact.path, f"{artifact.size} bytes; a {artifact.kind} has at most {MAX_BYTES[artifact.kind]}"
    total = sum(artifact.size for artifact in files)
    if total > MAX_TOTAL_BYTES:
        yield "artifacts", f"{total} bytes in all, at most {MAX_TOTAL_BYTES} are allowed"


def contradictions(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) wherever one part of the manifest contradicts another."""
    yield from _expert_contradictions(manifest)
    for graph in manifest.graphs:
        for problem in _graph_contradictions(manifest, graph):
            yield f"graphs.{graph.name}", problem
    for variant in manifest.variants:
        for problem in _variant_contradictions(manifest, variant):
            yield f"variants.{variant.name}", problem
    if len({variant.name for variant in manifest.variants}) < len(manifest.variants):
        yield "variants", "has a name twice"
    names = [graph.name for graph in manifest.graphs]
    if not names or len(set(names)) < len(names):
        yield "graphs", "needs at least one graph, each with its own name"
    paths = [artifact.path for artifact in manifest.artifacts]
    if manifest.tokenizer and manifest.tokenizer.path not in paths:
        yield "tokenizer", f"its file {manifest.tokenizer.path!a} is not listed"
    yield from _report_contradictions(manifest)
    yield from _encoder_contradictions(manifest)
    yield from _hot_contradictions(manifest)


def _expert_contradictions(manifest: Manifest) -> Iterator[tuple[str, str]]:
    names = [expert.name for expert in manifest.experts]
    if len(set(names)) < len(names) or [expert.column for expert in manifest.experts] != list(range(len(names))):
        yield "experts", "need unique names and columns 0, 1, 2, … in order"
    for site in manifest.sites:
        if len(site.experts) != len(site.ranks) or _strangers(site.experts, names):
            yield f"sites.{site.path}", f"experts {list(site.experts)} and ranks {list(site.ranks)} do not fit {names}"
    if len({site.path for site in manifest.sites}) < len(manifest.sites):
        yield "sites", "has a path twice"
    if manifest.gate and len(manifest.gate.scaling_pass_row) != len(names):
        yield "gate", f"its row has {len(manifest.gate.scaling_pass_row)} entries, there are {len(names)} experts"


def _graph_contradictions(manifest: Manifest, graph: GraphInfo) -> Iterator[str]:
    kinds = {artifact.path: artifact.kind for artifact in manifest.artifacts}
    if kinds.get(graph.path) != "graph" or graph.path != f"{graph.name}.onnx":
        yield f"its file {graph.path!a} is not a listed graph called {graph.name}.onnx"
    form = graph.onnxruntime
    if form is not None and (kinds.get(form.path) != "graph" or form.path != f"{graph.name}.ort.onnx"):
        yield f"its form {form.path!a} is not a listed graph called {graph.name}.ort.onnx"
    if form is not None and form.signature != in_style(graph.signature, CacheStyle.ALIAS):
        yield "its form for ONNX Runtime has another signature"
    if (graph.mode is Mode.STATIC) != (graph.mix is not None):
        yield "a static graph has a mix, a dynamic one has none"
    if graph.mode is Mode.STATIC and graph.signature.input(SCALINGS):
        yield "a static graph takes no scalings"
    mixed = [*(graph.mix or {}), *(name for weights in graph.mix_sites.values() for name in weights)]
    strangers = _strangers(mixed, [expert.name for expert in manifest.experts])
    if strangers:
        yield f"its mix names unknown experts: {', '.join(strangers)}"
    if unknown := _strangers(graph.mix_sites, [site.path for site in manifest.sites]):
        yield f"its mix names unknown sites: {', '.join(unknown)}"
    if graph.mode is Mode.DYNAMIC and (graph.mix_sites or graph.merge):
        yield "a dynamic graph has no merge"
    yield from _router_contradictions(manifest, graph)
    inputs = [spec.name for spec in graph.signature.inputs]
    outputs = [spec.name for spec in graph.signature.outputs]
    if len(set(inputs)) < len(inputs) or len(set(outputs)) < len(outputs):
        yield "its signature has a name twice"
    carried = [carry.output for carry in graph.signature.carries if carry.input in inputs]
    if len(carried) < len(graph.signature.carries) or _strangers(carried, outputs):
        yield "its signature carries tensors that it does not have"


def _router_contradictions(manifest: Manifest, graph: GraphInfo) -> Iterator[str]:
    if (graph.router is None) != (graph.signature.input(ROUTER) is None):
        yield "exactly the graphs with a router take the input router"
    if graph.router is None:
        return
    if graph.signature.input(SCALINGS) is None or graph.signature.output(GATE) is not None:
        yield "a graph with a router takes scalings and has no gate"
    experts = [expert.name for expert in manifest.experts]
    if graph.router.kind == "arrow" and graph.router.top_k > len(experts):
        yield f"its router picks {graph.router.top_k} experts, there are {len(experts)}"
    if graph.router.kind == "arrow" and set(graph.router.general) & set(experts):
        yield "its router names experts as general adapters"


def _hot_contradictions(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Adapters as inputs: the sites, the inputs of the dynamic graphs and the first values belong together."""
    hot = manifest.hot
    inputs = {graph.name: adapter_inputs(graph.signature) for graph in manifest.graphs}
    if hot is None:
        for name in [name for name, specs in inputs.items() if specs]:
            yield f"graphs.{name}", "reads adapters from inputs that the manifest does not describe"
        return
    if sorted(site.path for site in hot.sites) != sorted(site.path for site in manifest.sites):
        yield "hot.sites", "are not the sites"
    groups: dict[str, list[int]] = {}
    for site in hot.sites:
        groups.setdefault(site.group, []).append(site.place)
    if wrong := [group for group, places in groups.items() if places != list(range(len(places)))]:
        yield "hot.sites", f"the places in {', '.join(wrong)} are not 0, 1, 2, … in order"
    wanted = stack_specs(hot.sites, manifest.base.dtype)
    for graph in manifest.graphs:
        scalings = graph.signature.input(SCALINGS)
        is_right = inputs[graph.name] == (wanted if graph.mode is Mode.DYNAMIC else ())
        if not is_right or (scalings is not None and scalings.shape[3] != hot.max_experts):
            yield f"graphs.{graph.name}", "its adapter inputs are not those of the manifest's sites"
    if sum(expert.rank for expert in manifest.experts) > hot.max_total_rank:
        yield "hot.max_total_rank", "is less than the experts' ranks"
    if len(manifest.experts) > hot.max_experts or (manifest.gate and len(manifest.experts) != hot.max_experts):
        yield "hot.max_experts", "does not fit the experts"
    if not any(file.path == hot.path and file.kind == "weights" for file in manifest.artifacts):
        yield "hot.path", f"{hot.path!a} is no listed weights file"


def _variant_contradictions(manifest: Manifest, variant: VariantInfo) -> Iterator[str]:
    graph = next((graph for graph in manifest.graphs if graph.name == variant.graph), None)
    if graph is None:
        yield f"its graph {variant.graph!a} does not exist"
        return
    if (variant.kind is VariantKind.STATIC) != (graph.mode is Mode.STATIC):
        yield f"a {variant.kind} variant cannot run on a {graph.mode} graph"
    if (variant.kind is VariantKind.MIX) != (variant.mix is not None):
        yield "exactly the variants of the kind mix have a mix"
    if variant.kind is VariantKind.GATE and (manifest.gate is None or graph.signature.output(GATE) is None):
        yield "there is no gate"
    if variant.kind is VariantKind.ROUTER and (graph.router is None or variant.name != graph.router.kind):
        yield "its graph has no router of this name"
    if variant.mix is not None:
        yield from _mix_contradictions(manifest, graph, variant.mix)


def _mix_contradictions(manifest: Manifest, graph: GraphInfo, mix: MixInfo) -> Iterator[str]:
    named = {name for weights in (mix.weights, *mix.sites.values()) for name in weights}
    if strangers := _strangers(named, [expert.name for expert in manifest.experts]):
        yield f"its mix names unknown experts: {', '.join(strangers)}"
    if strangers := _strangers(mix.sites, [site.path for site in manifest.sites]):
        yield f"its mix names unknown sites: {', '.join(strangers)}"
    scalings = graph.signature.input(SCALINGS)
    if mix.is_per_site and scalings is not None and scalings.shape[2] != len(manifest.sites):
        yield "its mix has weights by site, its graph has not one row of scalings a site"


def _encoder_contradictions(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """An encoder says what its graphs give, and its graphs give just that; a decoder is none."""
    encoder, widths = manifest.encoder, {Task.FEATURE_EXTRACTION: (EMBEDDINGS, manifest.base.hidden_size)}
    if (manifest.task is Task.TEXT_GENERATION) != (encoder is None):
        yield "encoder", f"does not fit the task {manifest.task}"
        return
    if encoder is None:
        return
    widths[Task.TEXT_CLASSIFICATION] = (LOGITS, len(encoder.labels))
    embeds = manifest.task is Task.FEATURE_EXTRACTION
    if embeds != (encoder.pooling is not None) or embeds == bool(encoder.labels) or embeds == bool(encoder.scores):
        yield "encoder", "embeddings have a pooling, classes have labels and scores; not both"
    if encoder.max_tokens > manifest.base.max_positions:
        yield "encoder", f"{encoder.max_tokens} tokens, the base has {manifest.base.max_positions} positions"
    if manifest.gate and manifest.gate.scaling_pass_row_per_length:
        yield "gate", "the flattened top-k softmax depends on the batch and has no encoder"
    name, width = widths[manifest.task]
    for graph in manifest.graphs:
        output = graph.signature.output(name)
        if output is None or output.shape != ("B", width) or graph.signature.input(LENGTHS) is None:
            yield f"graphs.{graph.name}", f"is no encoder with {name} [B, {width}]"


def _report_contradictions(manifest: Manifest) -> Iterator[tuple[str, str]]:
    graphs = [graph.name for graph in manifest.graphs]
    reported = [report.graph for report in manifest.reports]
    if _strangers(reported, graphs) or len(set(reported)) < len(reported):
        yield "reports", f"are of {reported}, the graphs are {graphs}"
    for report in manifest.reports:
        for check in report.checks:
            if check.passed != (check.value <= check.limit):
                yield f"reports.{report.graph}.{check.name}", "says passed where the value is not within the limit"


def _strangers(names: Iterable[str], known: Sequence[str]) -> list[str]:
    return sorted(set(names) - set(known))
