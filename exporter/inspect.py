"""`python -m exporter inspect PATH`: what a checkpoint holds, what will be used, what is refused and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from exporter.adapters import AdapterSet, Expert, GateConfig
from exporter.checkpoints import BaseDescription, base_reference, check_against_base, describe_base, read_adapters
from exporter.checkpoints.gate_config import ORIGINAL_CONFIG, PEFT_CONFIG, Layout, layout_of
from exporter.errors import ExportError
from exporter.model_facts import require_traceable
from exporter.spec import AdapterSource, CacheChoice
from runtime.adapter_folder.files import is_file, is_folder
from runtime.errors import Problems, UserError
from runtime.manifest import MANIFEST_NAME, Emit, TopkSoftmax


@dataclass(slots=True)
class InspectReport:
    """What was found; `problems` is empty when the checkpoint can be exported."""

    path: Path
    kind: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    experts: list[tuple[str, ...]] = field(default_factory=list)  # as in EXPERT_HEADER
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


EXPERT_HEADER = ("column", "name", "key", "kind", "rank", "modules", "scale", "folder")


def inspect_checkpoint(path: Path) -> InspectReport:
    """Look at a LoRA, X-LoRA or base folder; bad input becomes `problems`, never an exception."""
    report = InspectReport(path, "unknown")
    try:
        report.kind = _kind_of(path)
        if is_file(path / MANIFEST_NAME):
            raise ExportError("is a finished bundle", fix=f"python -m runtime inspect {path}")
        if report.kind == "base model":
            base = describe_base(str(path))
            _add_base(report, base)
            require_traceable(base, Emit.PORTABLE)
        else:
            _inspect_adapters(report)
    except UserError as error:
        report.problems += _texts(error)
    return report


def render(report: InspectReport) -> str:
    """The report as text for a terminal."""
    lines = [f"{report.path}: {report.kind}"]
    width = max((len(name) for name, _ in report.facts), default=0)
    lines += [f"  {name:<{width}}  {value}" for name, value in report.facts]
    if report.experts:
        lines += ["", *_table([EXPERT_HEADER, *report.experts])]
    if report.notes:
        lines += ["", *(f"note: {note}" for note in report.notes)]
    if report.problems:
        lines += ["", "refused:", *(f"  - {problem}" for problem in report.problems)]
    else:
        lines += ["", "can be exported"]
    return "\n".join(lines)


def _kind_of(path: Path) -> str:
    if is_folder(path) and not is_file(path / PEFT_CONFIG) and not is_file(path / ORIGINAL_CONFIG):
        return "base model" if is_file(path / "config.json") else "no checkpoint"
    layouts = {Layout.PEFT: "X-LoRA (PEFT layout)", Layout.ORIGINAL: "X-LoRA (original layout)", None: "adapter"}
    return layouts[layout_of(path)] if is_folder(path) else "no folder"


def _inspect_adapters(report: InspectReport) -> None:
    """Read the adapters; when only the top-k rule is missing, say so and show the rest."""
    sources = [AdapterSource(report.path)]
    try:
        adapters = read_adapters(sources, None, topk_softmax=None, cache=CacheChoice.NONE)
    except UserError as error:
        report.problems += _texts(error)
        if error.code != "E_TOPK":
            return
        adapters = read_adapters(sources, None, topk_softmax=TopkSoftmax.TOKEN, cache=CacheChoice.NONE)
    report.experts += [_expert_row(column, expert) for column, expert in enumerate(adapters.experts)]
    if adapters.gate is not None:
        _add_gate(report, adapters, adapters.gate)
    report.notes += [note for note in adapters.notes if not note.startswith("column ")]  # the table shows them
    _check_base(report, adapters)


def _expert_row(column: int, expert: Expert) -> tuple[str, ...]:
    ranks = sorted({delta.a.shape[0] for delta in expert.deltas.values()})
    scales = sorted({round(delta.scale, 4) for delta in expert.deltas.values()})
    return (
        str(column), expert.name, expert.key, expert.kind.value, _span(ranks), str(len(expert.deltas)), _span(scales),
        str(expert.folder),
    )  # fmt: skip


def _span(values: list[int] | list[float]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}..{values[-1]}"


def _add_gate(report: InspectReport, adapters: AdapterSet, gate: GateConfig) -> None:
    sites = {path for expert in adapters.experts for path in expert.deltas}
    widths = [gate.weights[0].shape[1], *(weight.shape[0] for weight in gate.weights)]
    report.facts += [
        ("gate", f"{len(gate.weights)} Linear: {' -> '.join(map(str, widths))}"),
        ("scalings", f"one set per token and module ({len(sites)})" if gate.layerwise else "one set per token"),
        ("softmax", f"temperature {gate.temperature}" if gate.softmax else "none"),
        ("top-k", str(gate.top_k) if gate.top_k else "none"),
        ("top-k softmax", gate.topk_softmax.value if gate.softmax_topk else "none"),
        ("scaling pass value", str(gate.scaling_pass_value)),
        ("global scaling weight", str(gate.global_scaling_weight)),
    ]


def _check_base(report: InspectReport, adapters: AdapterSet) -> None:
    """Describe and compare the base the configs name, where it is here."""
    try:
        reference = base_reference(None, adapters)
    except UserError as error:
        report.facts.append(("base", f"to be given with --base ({error.what})"))
        return
    base = describe_base(reference)
    _add_base(report, base)
    report.notes += check_against_base(adapters, base)
    require_traceable(base, Emit.PORTABLE)


def _add_base(report: InspectReport, base: BaseDescription) -> None:
    text = base.text_config
    size = sum(path.stat().st_size for path in base.files)
    report.facts += [
        ("base", base.reference),
        ("task", base.task.value),
        ("model", f"{base.model_type}, {text.num_hidden_layers} blocks, hidden {base.hidden_size}"),
        ("vocabulary", f"{text.vocab_size}{', tied embeddings' if base.tied_embeddings else ''}"),
        ("weights", f"{len(base.files)} safetensors files, {size:,} bytes"),
    ]
    report.notes += base.notes


def _texts(error: UserError) -> list[str]:
    return [str(problem) for problem in error.problems] if isinstance(error, Problems) else [str(error)]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
