"""The story of a build: read, check, trace, fold, store, verify, publish. One function; one line a stage."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from exporter.calibration import calibrate
from exporter.checkpoints import load_blank
from exporter.describe import describe
from exporter.errors import VerifyError
from exporter.external_data import check_external_data
from exporter.generation_defaults import generation_defaults, generation_notes
from exporter.graph_exports import export_graphs, open_store, static_rows
from exporter.graphs import Exported
from exporter.inputs import Inputs, default_out, read_inputs, require_apart
from exporter.merges.merge import as_log, in_total, settled
from exporter.op_lint import STATUS, lint, require_lintable
from exporter.parts import Parts, load_parts, make_verification
from exporter.publish import publish, stage
from exporter.rounding import require_half_range, require_rounded, round_model
from exporter.saved_adapter import save_adapter
from exporter.spec import BuildSpec, DType
from exporter.staged_folder import staged_folder
from exporter.tokenizer import load_tokenizer, write_tokenizer
from exporter.twin import prove_by_twin
from exporter.variants import static_variants
from exporter.verify import LOGITS_LIMIT
from exporter.watch import PeakMemory, StageClock
from runtime.bundle import Bundle
from runtime.encode_golden import ENCODED_PATH, EncodedCase, EncodedGolden
from runtime.engines import Target
from runtime.golden import GOLDEN_PATH, Golden, GoldenCase
from runtime.manifest import Emit, Mode, Task, VerifyLevel, VerifyReport
from runtime.quantization import ActivationType, QuantizeMethod
from runtime.text import Text

TWIN = "twin"  # the fp32 graphs of an fp16 or bf16 build, inside the stage until they are verified


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
        require_apart(spec, inputs, out)
        with ExitStack() as stages:
            adapter = stages.enter_context(staged_folder(spec.save_adapter)) if spec.save_adapter else None
            estimate = estimate_bytes(spec, inputs)
            staged = stages.enter_context(stage(out, overwrite=spec.overwrite, estimate_bytes=estimate))
            root = staged.folder
            with clock.stage("tokenizer"):
                tokenizer, said = write_tokenizer(inputs.base, inputs.adapters, spec.tokenizer, root)
            for note in said:
                clock.notes(note)
            twins = {}
            if is_structure_only(spec):
                with clock.stage("prove on a small twin"):
                    twins = prove_by_twin(inputs, spec)
            with clock.stage("load base"):
                blank = load_blank(inputs.base, torch_dtype(spec)) if is_structure_only(spec) else None
                parts = load_parts(inputs, spec.gate_op, spec.hot, blank)
                if spec.dtype is DType.FLOAT16 and blank is None:
                    require_half_range(parts.model)
            if inputs.base.task is Task.TEXT_GENERATION:  # refused before any graph is made
                for note in generation_notes(generation_defaults(parts.model, inputs.base.folder)):
                    clock.notes(note)
            hessians = {}
            if spec.quantize is not None and spec.quantize.method is QuantizeMethod.GPTQ:
                with clock.stage("calibrate"):
                    hessians = calibrate(parts, spec, load_tokenizer(root, tokenizer))
            first = DType.FLOAT32 if blank is None else spec.dtype  # what no numbers are compared of needs no twin
            proof_root = root if first is spec.dtype else root / TWIN
            with clock.stage("copy shards", root):
                store = open_store(parts, spec, first, proof_root)
            with clock.stage("trace and store", root):
                proofs = export_graphs(parts, spec, first, store, None, hessians)
            check_operators(proofs, spec, clock)
            with clock.stage("verify"):
                reports, golden = verify_graphs(parts, spec, proofs, proof_root, load_tokenizer(root, tokenizer), clock)
            reports = [report.model_copy(update={"twin": twins.get(report.graph)}) for report in reports]
            for note in idle_adapter_notes(reports, proofs):
                clock.notes(note)
            if adapter is not None and spec.save_adapter is not None:
                with clock.stage("save adapter"):
                    rows, merge = static_rows(parts, spec), settled(spec.merge)
                    notes = save_adapter(inputs, parts.sites, rows, merge, adapter, spec.save_adapter)
                for note in notes:
                    clock.notes(note)
            graphs = proofs
            if first is not spec.dtype:
                with clock.stage(f"round to {spec.dtype}", root):
                    graphs = export_rounded(parts, spec, proofs, root)
                check_operators(graphs, spec, clock)  # other dtypes, other rules
            for note in added_weights_notes(graphs):
                clock.notes(note)
            write_golden(golden, root)
            with clock.stage("digest sources"):
                store = graphs[0].store
                manifest = describe(parts, spec, graphs, reports, tokenizer, store.copied)
            check_external_data(root)
            with clock.stage("publish"):
                log = {
                    "seconds": clock.seconds,
                    "notes": (*inputs.notes, *said),
                    "peak_bytes": clock.memory.as_dict(),
                    "merges": merge_log(proofs),
                }
                return publish(staged, manifest, log, store.digests)


def estimate_bytes(spec: BuildSpec, inputs: Inputs) -> int:
    """What the stage will hold at its fullest, roughly: stored weights, changed weights, the twin's."""
    stored = sum(path.stat().st_size for path in inputs.base.files)
    numbers = sum(math.prod(shape) for shape in inputs.base.shapes.values())
    copies = 1 + len(static_variants(spec))
    if is_structure_only(spec):
        return max(stored, torch_dtype(spec).itemsize * numbers) * copies + (64 << 20)
    base = max(stored, 4 * numbers)  # the graphs are fp32 (or have an fp32 twin), the files may be bf16
    return base * (copies + (2 if spec.dtype is not DType.FLOAT32 else 0)) + (64 << 20)


def is_structure_only(spec: BuildSpec) -> bool:
    """Whether no number is computed, of a graph or of its weights: then the base need never be in memory."""
    return spec.verify is VerifyLevel.STRUCTURE and spec.quantize is None


def torch_dtype(spec: BuildSpec) -> torch.dtype:
    """The build's."""
    dtype = getattr(torch, spec.dtype.value)
    assert isinstance(dtype, torch.dtype)
    return dtype


def added_weights_notes(graphs: Sequence[Exported]) -> Iterator[str]:
    """A line for each static graph: what it costs on disk besides what all share."""
    for graph in graphs:
        if graph.info.mode is Mode.STATIC:
            own = [at.length for name, at in graph.store.stored.items() if name.startswith(f"{graph.info.name}/")]
            yield f"graph {graph.info.name} adds {sum(own):,} bytes of weights in {len(own)} tensors"


def merge_log(graphs: Sequence[Exported]) -> dict[str, object]:
    """Graph -> what its merge did, in total and module by module."""
    return {
        graph.info.name: {"total": as_log(in_total(graph.merges)), "sites": [as_log(one) for one in graph.merges]}
        for graph in graphs
        if graph.info.mode is Mode.STATIC
    }


def check_operators(graphs: Sequence[Exported], spec: BuildSpec, clock: StageClock) -> None:
    """Lint for old TensorRT: an error where engines of it are asked for, a note where a portable graph is not clean."""
    for graph in graphs:
        if Target.TRT in spec.targets:
            require_lintable(graph.model, graph.info.name)
        elif spec.emit is Emit.PORTABLE and (found := lint(graph.model)):
            operators = ", ".join(sorted({finding.operator for finding in found}))
            clock.notes(f"graph {graph.info.name}: TensorRT 10.3 may not take {operators} ({STATUS})")


def verify_graphs(
    parts: Parts, spec: BuildSpec, exported: list[Exported], folder: Path, text: Text | None, clock: StageClock
) -> tuple[list[VerifyReport], list[GoldenCase | EncodedCase]]:
    """Check every fp32 graph against the reference forward; raises VerifyError.

    Where activations are rounded a last bit may move a rounding, so a form that is right may differ by more than
    its limits: it is then left out of `exported`, and the graph is checked alone.
    """
    verification = make_verification(parts, spec, text)
    results = []
    for place, graph in enumerate(exported):
        try:
            results.append(verification.run(folder, graph.info))
        except VerifyError as error:
            form = graph.info.onnxruntime
            if form is None or spec.quantize is None or spec.quantize.activations is not ActivationType.INT8:
                raise
            exported[place] = replace(graph, info=graph.info.model_copy(update={"onnxruntime": None}))
            results.append(verification.run(folder, exported[place].info))
            (folder / form.path).unlink()
            clock.notes(f"graph {graph.info.name}: no form for ONNX Runtime, rounded activations move it: {error}")
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


def export_rounded(parts: Parts, spec: BuildSpec, proofs: Sequence[Exported], root: Path) -> list[Exported]:
    """The same graphs with weights rounded to fp16 or bf16, proved to be just that."""
    round_model(parts.model, torch_dtype(spec))
    graphs = export_graphs(parts, spec, spec.dtype, open_store(parts, spec, spec.dtype, root), proofs[0].store)
    for proof, rounded in zip(proofs, graphs, strict=True):
        require_rounded(proof, rounded)
    shutil.rmtree(root / TWIN)
    return graphs


def write_golden(cases: Sequence[GoldenCase | EncodedCase], root: Path) -> None:
    """The golden set, where verification produced one: a decoder's or an encoder's."""
    tokens = tuple(case for case in cases if isinstance(case, GoldenCase))
    vectors = tuple(case for case in cases if isinstance(case, EncodedCase))
    for path, golden in ((GOLDEN_PATH, Golden(cases=tokens)), (ENCODED_PATH, EncodedGolden(cases=vectors))):
        if golden.cases:
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_text(golden.model_dump_json() + "\n", encoding="utf-8")
