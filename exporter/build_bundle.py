"""The story of a build: read, check, trace, fold, store, verify, publish. One function; one line a stage."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exporter.adapters import AdapterSet, Expert
from exporter.checkpoints import (
    BaseDescription,
    base_reference,
    check_against_base,
    check_half_range,
    describe_base,
    load_base,
    read_adapters,
    require_free,
    source_files,
)
from exporter.errors import ExportError
from exporter.external_data import check_external_data
from exporter.gate import Gate, PluginGate, gate_info
from exporter.graphs import OPSETS, Exported, GraphPlan, export_graph, parameter_count
from exporter.merges.merge import SiteMerge, as_log, in_total, settled
from exporter.model_facts import base_info, module_kinds, refuse_untraceable, signature_shape, untying_notes
from exporter.op_lint import STATUS, lint, require_lintable
from exporter.publish import publish, stage
from exporter.reference import Reference
from exporter.rounding import require_half_range, require_rounded, round_model
from exporter.saved_adapter import save_adapter
from exporter.sites import Site, SiteKind, stack
from exporter.spec import BuildSpec, CacheChoice, DType, OpChoice, VariantSpec
from exporter.static import (
    folded_weights,
    mix_row,
    mix_rows,
    replaced_weights,
    replacements_of,
    rounded_weights,
    touched_sites,
    untied,
)
from exporter.store import WeightStore
from exporter.tokenizer import load_tokenizer, write_tokenizer
from exporter.variants import (
    check_variants,
    has_row_per_site,
    require_foldable,
    require_switchable,
    static_variants,
    variant_infos,
)
from exporter.verification import EXACT, Verification
from exporter.verify import LOGITS_LIMIT
from exporter.watch import PeakMemory, StageClock
from plugins.operators import GATE_SCALINGS, GATED_LOW_RANK
from runtime.bundle import Bundle
from runtime.engines import Target
from runtime.golden import GOLDEN_PATH, Golden, GoldenCase
from runtime.manifest import (
    FORMAT_VERSION,
    AdapterKind,
    Emit,
    ExpertInfo,
    GraphInfo,
    Manifest,
    MergeInfo,
    MergeMethod,
    MixInfo,
    Mode,
    SiteInfo,
    TokenizerInfo,
    VerifyLevel,
    VerifyReport,
)
from runtime.mix import mix_note
from runtime.signature import CacheStyle, signature_from_shape
from runtime.text import Text

FULL_UP_TO = 300_000_000  # parameters; above, `quick` is the default and weights stay mapped in verification
VERSIONED = ("torch", "transformers", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
GATES: dict[OpChoice, type[Gate]] = {OpChoice.OPS: Gate, OpChoice.PLUGIN: PluginGate}
TWIN = "twin"  # the fp32 graphs of an fp16 or bf16 build, inside the stage until they are verified


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything read and checked before any heavy work."""

    adapters: AdapterSet
    base: BaseDescription
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """The loaded model and what its graphs are made from."""

    inputs: Inputs
    model: Any  # transformers.PreTrainedModel
    kinds: Sequence[tuple[str, SiteKind]]
    sites: tuple[Site, ...]
    gate: Gate | None


def build(spec: BuildSpec, clock: StageClock | None = None) -> Bundle:
    """Make the bundle that `spec` asks for; on any failure nothing is published.

    Raises ExportError for bad input, VerifyError when a graph is not the model, MachineError for disk trouble.
    """
    clock = clock or StageClock()
    with PeakMemory() as clock.memory:
        with clock.stage("read and check"):
            inputs = read_inputs(spec)
        for note in inputs.notes:
            clock.notes(note)
        out = spec.out or default_out(spec, inputs)
        with stage(out, overwrite=spec.overwrite, estimate_bytes=estimate_bytes(spec, inputs)) as staged:
            root = staged.folder
            tokenizer = write_tokenizer(inputs.base, root)
            with clock.stage("load base"):
                parts = load_parts(inputs, spec.gate_op)
                if spec.dtype is DType.FLOAT16:
                    require_half_range(parts.model)
            proof_root = root if spec.dtype is DType.FLOAT32 else root / TWIN
            with clock.stage("trace and store", root):
                proofs = export_graphs(parts, spec, DType.FLOAT32, proof_root)
            check_operators(proofs, spec, clock)
            with clock.stage("verify"):
                reports, golden = verify_graphs(parts, spec, proofs, proof_root, root)
            for note in idle_adapter_notes(reports, proofs):
                clock.notes(note)
            if spec.save_adapter is not None:
                with clock.stage("save adapter"):
                    merge = settled(spec.merge)
                    notes = save_adapter(
                        inputs.adapters, parts.sites, static_rows(parts, spec), merge, spec.save_adapter
                    )
                for note in notes:
                    clock.notes(note)
            graphs = proofs
            if spec.dtype is not DType.FLOAT32:
                with clock.stage(f"round to {spec.dtype}", root):
                    graphs = export_rounded(parts, spec, proofs, root)
                check_operators(graphs, spec, clock)  # other dtypes, other rules
            for note in added_weights_notes(graphs):
                clock.notes(note)
            write_golden(golden, root)
            with clock.stage("digest sources"):
                manifest = describe(parts, spec, graphs, reports, tokenizer)
            check_external_data(root)
            with clock.stage("publish"):
                log = {
                    "seconds": clock.seconds,
                    "notes": inputs.notes,
                    "peak_bytes": clock.memory.as_dict(),
                    "merges": merge_log(proofs),
                }
                return publish(staged, manifest, log)


def read_inputs(spec: BuildSpec) -> Inputs:
    """Read adapters and the base's description, and refuse whatever cannot be exported."""
    check_spec(spec)
    adapters = read_adapters(spec.adapters, spec.gate, topk_softmax=spec.topk_softmax, cache=spec.cache)
    base = describe_base(base_reference(spec.base, adapters))
    refuse_untraceable(base, spec.emit)
    notes = check_against_base(adapters, base)
    if spec.dtype is DType.FLOAT16:
        check_half_range(adapters)
    if Mode.DYNAMIC in spec.modes:
        require_switchable(adapters.experts)
    check_variants(spec, adapters)
    touched = {path for expert in adapters.experts for path in expert.deltas}
    mixed = check_mix(spec, adapters, touched)
    touched |= {
        name.rpartition(".")[0] for e in adapters.experts for name, new in e.replacements.items() if not new.rows
    }
    return Inputs(adapters, base, (*adapters.notes, *base.notes, *notes, *untying_notes(base, touched), *mixed))


def check_mix(spec: BuildSpec, adapters: AdapterSet, touched: Collection[str]) -> tuple[str, ...]:
    """Refuse a mix of strangers; returns what to say of an odd one."""
    if spec.mix_info is not None:  # `check_variants` looks at the named ones
        mix_rows(spec.mix_info, [expert.name for expert in adapters.experts], sorted(touched))
        for weights in (spec.mix_info.weights, *spec.mix_info.sites.values()):
            require_foldable(weights, adapters.experts)
    folded = static_variants(spec)
    for variant in folded:
        require_mergeable(variant.mix, spec, adapters.experts)
    mixes = [variant.mix for variant in (*folded, *spec.variants)]
    notes = dict.fromkeys(mix_note(weights) for mix in mixes for weights in (mix.weights, *mix.sites.values()))
    return tuple(note for note in notes if note)


def require_mergeable(mix: MixInfo, spec: BuildSpec, experts: Sequence[Expert]) -> None:
    """Refuse to merge, to save as a LoRA, or to weigh by module an expert that is more than low-rank updates."""
    where = "--save-adapter" if spec.save_adapter else "--merge"
    is_sum = settled(spec.merge).method in EXACT and not spec.save_adapter
    used = {name for weights in (mix.weights, *mix.sites.values()) for name, weight in weights.items() if weight}
    for expert in experts:
        if expert.name in used and expert.replacements and mix.is_per_site:
            got = f"it replaces {', '.join(expert.replacements)} of the base"
            raise ExportError(f"{expert.name} cannot have weights by module", where="--mix", got=got, code="E_MIX")
        if expert.name in used and not is_sum and (expert.kind is AdapterKind.DORA or expert.replacements):
            is_dora = expert.kind is AdapterKind.DORA
            what = "DoRA rescales whole weights" if is_dora else "it replaces weights of the base"
            raise ExportError(f"{expert.name} is no plain sum of low-rank updates: {what}", where=where, code="E_MIX")


def check_spec(spec: BuildSpec) -> None:
    """Refuse settings that contradict each other."""
    if not spec.adapters and spec.gate is None:
        raise ExportError("no adapters given", where="--adapters", need="an X-LoRA folder, or NAME=DIR of LoRA folders")
    if spec.threads is not None and spec.threads < 1:
        raise ExportError("threads", where="--threads", got=str(spec.threads), need="at least 1")
    if Mode.STATIC in spec.modes and not static_variants(spec):
        raise ExportError("a static graph needs a mix", where="--mode static", fix="--mix math=0.7,code=0.3")
    if Mode.STATIC not in spec.modes and spec.mix is not None:
        raise ExportError(
            "a mix is folded into static graphs only",
            where="--mix",
            got="--mode dynamic",
            fix="add --mode static, or give --mix to `runtime generate`",
        )
    merge = settled(spec.merge)
    if Mode.STATIC not in spec.modes and (merge.method is not MergeMethod.LINEAR or spec.save_adapter):
        where = "--save-adapter" if spec.save_adapter else "--merge"
        raise ExportError("only static graphs have merged experts", where=where, fix="add --mode static and --mix")
    if spec.save_adapter is not None:
        require_free(spec.save_adapter, overwrite=spec.overwrite)
    if spec.emit is Emit.MODERN and spec.cache is CacheChoice.NONE:
        raise ExportError("the modern emit always has a K/V cache", where="--cache none", fix="--emit portable")


def default_out(spec: BuildSpec, inputs: Inputs) -> Path:
    """./NAME-MODE, named after the X-LoRA folder or the base."""
    gated = spec.gate or (spec.adapters[0].path if inputs.adapters.gate else None)
    name = gated.resolve().name if gated else inputs.base.name.rsplit("/", 1)[-1]
    return Path(f"{name}-{'-'.join(mode.value for mode in spec.modes)}")


def estimate_bytes(spec: BuildSpec, inputs: Inputs) -> int:
    """What the stage will hold at its fullest, roughly: stored weights, changed weights, the twin's."""
    stored = sum(path.stat().st_size for path in inputs.base.files)
    written = 4 * sum(module.in_features * module.out_features for module in inputs.base.modules.values())
    base = max(stored, written)  # the graphs are fp32 (or have an fp32 twin), the files may be bf16
    copies = 1 + len(static_variants(spec)) + (2 if spec.dtype is not DType.FLOAT32 else 0)
    return base * copies + (64 << 20)


def load_parts(inputs: Inputs, gate_op: OpChoice = OpChoice.OPS) -> Parts:
    """The base in fp32, the sites and the gate."""
    model = load_base(inputs.base, torch.float32)
    kinds = module_kinds(inputs.base, model)
    gate = inputs.adapters.gate
    return Parts(
        inputs,
        model,
        kinds,
        stack(inputs.adapters, kinds, model),
        None if gate is None else GATES[gate_op](gate, len(inputs.adapters.experts)),
    )


def export_graphs(
    parts: Parts, spec: BuildSpec, dtype: DType, root: Path, twin: WeightStore | None = None
) -> list[Exported]:
    """All graphs of the build in one dtype, in one store; dynamic first, for static ones point into its weights.

    `twin` is the store of the fp32 build that is being rounded.
    """
    root.mkdir(exist_ok=True)
    store = WeightStore(root)
    graphs = [export_dynamic(parts, spec, dtype, store)] if Mode.DYNAMIC in spec.modes else []
    graphs += [export_static(parts, spec, variant, dtype, store, twin) for variant in static_variants(spec)]
    return graphs


def export_dynamic(parts: Parts, spec: BuildSpec, dtype: DType, store: WeightStore) -> Exported:
    """The gated graph. G = number of sites with a layerwise gate or mixes by site, else 1."""
    gate = parts.gate
    scalings = len(parts.sites) if has_row_per_site(spec, parts.inputs.adapters) else 1
    shape = signature_shape(
        parts.model,
        scalings,
        len(parts.inputs.adapters.experts),
        gate=gate is not None,
        dtype=dtype,
        cache=cache_style(spec),
    )
    plan = GraphPlan("dynamic", signature_from_shape(shape), spec.emit, parts.sites, gate, spec.site_op)
    return Exported(
        graph_info(plan, Mode.DYNAMIC, None, plugins_of(spec, gate)), export_graph(parts.model, plan, store), store
    )


def export_static(
    parts: Parts, spec: BuildSpec, variant: VariantSpec, dtype: DType, store: WeightStore, twin: WeightStore | None
) -> Exported:
    """The plain base graph with the mix folded in; only the changed tensors are stored anew."""
    model, name, experts = parts.model, variant.name, parts.inputs.adapters.experts
    names = [expert.name for expert in experts]
    rows, merge = mix_rows(variant.mix, names, [site.path for site in parts.sites]), settled(spec.merge)
    shape = signature_shape(model, 0, 0, gate=False, dtype=dtype, cache=cache_style(spec))
    sites = touched_sites(parts.sites, rows)
    torch_dtype = getattr(torch, dtype.value)
    measures: dict[str, SiteMerge] = {}
    new = replacements_of(experts, mix_row(variant.mix.weights, names))
    changed = folded_weights(model, sites, rows, name, merge, measures) | replaced_weights(model, new, name)
    if twin:
        changed = rounded_weights(twin, torch_dtype, name)
    with untied(model, sites, [weight for weight in new if new[weight].rows is None]) as partners:
        plan = GraphPlan(name, signature_from_shape(shape), spec.emit, changed=changed, partners=partners)
        info = static_info(graph_info(plan, Mode.STATIC, None), variant.mix, merge)
        return Exported(info, export_graph(model, plan, store), store, in_site_order(sites, measures))


def added_weights_notes(graphs: Sequence[Exported]) -> Iterator[str]:
    """A line for each static graph: what it costs on disk besides what all share."""
    for graph in graphs:
        if graph.info.mode is Mode.STATIC:
            own = [at.length for name, at in graph.store.stored.items() if name.startswith(f"{graph.info.name}/")]
            yield f"graph {graph.info.name} adds {sum(own):,} bytes of weights in {len(own)} tensors"


def in_site_order(sites: Sequence[Site], measures: Mapping[str, SiteMerge]) -> tuple[SiteMerge, ...]:
    """The store writes by name."""
    return tuple(measures[site.path] for site in sites if site.path in measures)


def static_rows(parts: Parts, spec: BuildSpec) -> torch.Tensor:
    """[sites, E]: the spec's mix."""
    mix = spec.mix_info
    assert mix is not None
    return mix_rows(mix, [expert.name for expert in parts.inputs.adapters.experts], [site.path for site in parts.sites])


def static_info(info: GraphInfo, mix: MixInfo, merge: MergeInfo) -> GraphInfo:
    """The record of a static graph: which mix, and how it was merged."""
    return info.model_copy(update={"mix": mix.weights, "mix_sites": mix.sites, "merge": merge})


def merge_log(graphs: Sequence[Exported]) -> dict[str, object]:
    """Graph -> what its merge did, in total and module by module."""
    return {
        graph.info.name: {"total": as_log(in_total(graph.merges)), "sites": [as_log(one) for one in graph.merges]}
        for graph in graphs
        if graph.info.mode is Mode.STATIC
    }


def cache_style(spec: BuildSpec) -> CacheStyle:
    """How this build's graphs carry K/V."""
    if spec.cache is CacheChoice.NONE:
        return CacheStyle.NONE
    return CacheStyle.ALIAS if spec.emit is Emit.MODERN else CacheStyle.APPEND


def plugins_of(spec: BuildSpec, gate: Gate | None) -> tuple[str, ...]:
    """The operators of ours that the dynamic graph will have."""
    chosen = ((GATE_SCALINGS, spec.gate_op if gate else OpChoice.OPS), (GATED_LOW_RANK, spec.site_op))
    return tuple(name for name, choice in chosen if choice is OpChoice.PLUGIN)


def graph_info(plan: GraphPlan, mode: Mode, mix: dict[str, float] | None, plugins: tuple[str, ...] = ()) -> GraphInfo:
    """The manifest's record of a graph."""
    return GraphInfo(
        name=plan.name,
        mode=mode,
        emit=plan.emit,
        opset=OPSETS[plan.emit],
        path=f"{plan.name}.onnx",
        signature=plan.signature,
        mix=mix,
        plugins=plugins,
    )


def check_operators(graphs: Sequence[Exported], spec: BuildSpec, clock: StageClock) -> None:
    """Lint for old TensorRT: an error where engines of it are asked for, a note where a portable graph is not clean."""
    for graph in graphs:
        if Target.TRT in spec.targets:
            require_lintable(graph.model, graph.info.name)
        elif spec.emit is Emit.PORTABLE and (found := lint(graph.model)):
            operators = ", ".join(sorted({finding.operator for finding in found}))
            clock.notes(f"graph {graph.info.name}: TensorRT 10.3 may not take {operators} ({STATUS})")


def verify_graphs(
    parts: Parts, spec: BuildSpec, exported: Sequence[Exported], folder: Path, root: Path
) -> tuple[list[VerifyReport], list[GoldenCase]]:
    """Check every fp32 graph against the reference forward; raises VerifyError."""
    verification = make_verification(parts, spec, load_tokenizer(root))
    results = [verification.run(folder, graph.info) for graph in exported]
    return [report for report, _ in results], [case for _, cases in results for case in cases]


def idle_adapter_notes(reports: Sequence[VerifyReport], graphs: Sequence[Exported]) -> Iterator[str]:
    """A line where the experts hardly change the base: usually they are untrained, or of another base."""
    for report, graph in zip(reports, graphs, strict=True):
        is_plain = graph.info.mode is Mode.STATIC and not graph.merges
        if report.checks and not is_plain and report.adapters_matter <= LOGITS_LIMIT:
            yield (
                f"graph {report.graph}: the experts change no logit by more than {report.adapters_matter:.2g}; "
                "are they trained, and on this base?"
            )


def make_verification(parts: Parts, spec: BuildSpec, tokenizer: Text | None) -> Verification:
    """The measures for this model, at the level asked for or the default for its size."""
    size = parameter_count(parts.model)
    info = base_info(parts.inputs.base, parts.model, spec.dtype)
    return Verification(
        reference=Reference(parts.model, parts.inputs.adapters, parts.kinds),
        adapters=parts.inputs.adapters,
        level=spec.verify or (VerifyLevel.FULL if size <= FULL_UP_TO else VerifyLevel.QUICK),
        spec=spec,
        tokenizer=tokenizer,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
        is_large=size > FULL_UP_TO,
    )


def export_rounded(parts: Parts, spec: BuildSpec, proofs: Sequence[Exported], root: Path) -> list[Exported]:
    """The same graphs with weights rounded to fp16 or bf16, proved to be just that."""
    round_model(parts.model, getattr(torch, spec.dtype.value))
    graphs = export_graphs(parts, spec, spec.dtype, root, proofs[0].store)
    for proof, rounded in zip(proofs, graphs, strict=True):
        require_rounded(proof, rounded)
    shutil.rmtree(root / TWIN)
    return graphs


def write_golden(cases: list[GoldenCase], root: Path) -> None:
    """The golden set, where verification produced one."""
    if cases:
        path = root / GOLDEN_PATH
        path.parent.mkdir(exist_ok=True)
        path.write_text(Golden(cases=tuple(cases)).model_dump_json() + "\n", encoding="utf-8")


def describe(
    parts: Parts,
    spec: BuildSpec,
    graphs: Sequence[Exported],
    reports: Sequence[VerifyReport],
    tokenizer: TokenizerInfo | None,
) -> Manifest:
    """The manifest, but for the files, which `publish` lists. Nothing in it depends on time or place."""
    adapters, base = parts.inputs.adapters, parts.inputs.base
    return Manifest(
        format_version=FORMAT_VERSION,
        name=base.name.rsplit("/", 1)[-1],
        base=base_info(base, parts.model, spec.dtype),
        experts=tuple(
            ExpertInfo(
                column=column,
                name=expert.name,
                key=expert.key,
                folder=expert.folder.resolve().name,
                rank=max((delta.a.shape[0] for delta in expert.deltas.values()), default=0),
                sites=len(expert.deltas),
                kind=expert.kind,
            )
            for column, expert in enumerate(adapters.experts)
        ),
        sites=tuple(SiteInfo(path=s.path, kind=s.kind.value, experts=s.experts, ranks=s.ranks) for s in parts.sites),
        gate=None if adapters.gate is None else gate_info(adapters.gate, len(adapters.experts)),
        graphs=tuple(graph.info for graph in graphs),
        variants=variant_infos(spec, adapters),
        tokenizer=tokenizer,
        artifacts=(),
        sources=source_files(adapters, base),
        reports=tuple(reports),
        versions={package: version(package) for package in VERSIONED},
    )
