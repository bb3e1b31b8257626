"""Foreign folders -> AdapterSet: which folder is what, experts in column order, the gate, and all that is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from exporter.adapters import AdapterSet, Expert, GateConfig, Origin
from exporter.checkpoints.gate_config import (
    ORIGINAL_CONFIG,
    PEFT_CONFIG,
    GateFolder,
    Layout,
    layout_of,
    read_gate_config,
    topk_rule,
)
from exporter.checkpoints.gate_weights import Classifier, read_classifier
from exporter.checkpoints.lora import LoraFolder, read_lora
from exporter.checkpoints.naming import Binding, bind_gate, bind_plain
from exporter.errors import ExportError
from exporter.spec import AdapterSource, CacheChoice
from runtime.adapter_folder.files import is_file, is_folder, shown_path
from runtime.adapter_folder.problems import gathering, listed, shortened
from runtime.errors import InputError, raise_all
from runtime.manifest import AdapterKind, TopkSoftmax

UNGATEABLE = {
    AdapterKind.DORA: "DoRA divides the changed weight by its norm, which is not linear in the gate's scalings",
    AdapterKind.ADALORA: "PEFT's X-LoRA takes LoRA experts only, so no gate was trained with it",
}


def read_adapters(
    sources: Sequence[AdapterSource],
    gate: Path | None,
    *,
    topk_softmax: TopkSoftmax | None,
    cache: CacheChoice,
    uses_gate: bool = True,
) -> AdapterSet:
    """Read and check everything `--adapters` and `--gate` name; all problems are raised at once.

    One X-LoRA folder brings its gate and, where no relocation says otherwise, its experts. LoRA folders alone have no
    gate; with `--gate` they are its relocated experts. Experts come in gate column order. A gate that is not used
    needs no rule for its top-k softmax, and takes any.
    """
    gate_path, experts = _sort_out(sources, gate)
    settings = read_gate_config(gate_path) if gate_path is not None else None
    bindings, notes = bind_gate(settings, experts) if settings else bind_plain(experts)
    problems: list[InputError] = []
    folders = _read_experts(bindings, problems)
    config = None
    if settings is not None:
        notes = [*settings.notes, *notes]
        problems.extend(_ungateable(bindings, folders))
        with gathering(problems):
            classifier = read_classifier(settings, _count_sites(folders, bindings))
            notes += classifier.notes
            rule = _topk_softmax(settings, topk_softmax, cache) if uses_gate else TopkSoftmax.TOKEN
            config = _gate_config(settings, classifier, rule)
    raise_all("--adapters", shortened(problems))
    origins = [_origin(binding, folder) for binding, folder in zip(bindings, folders, strict=True)]
    if settings is not None:
        files = (settings.folder / _config_name(settings), *classifier.files)
        origins.append(Origin("gate", settings.folder, files, settings.base_name))
    return AdapterSet(
        experts=tuple(_expert(binding, folder) for binding, folder in zip(bindings, folders, strict=True)),
        gate=config,
        notes=(*notes, *_mapping_notes(bindings, settings), *_replacement_notes(bindings, folders)),
        origins=tuple(origins),
    )


def _sort_out(sources: Sequence[AdapterSource], gate: Path | None) -> tuple[Path | None, list[AdapterSource]]:
    """The gate's folder, and the sources that are experts."""
    if not sources and gate is None:
        raise ExportError("no adapters are given", where="--adapters", need="an X-LoRA folder, or NAME=DIR for each")
    problems: list[InputError] = []
    gates, experts = ([gate] if gate is not None else []), []
    for source in sources:
        with gathering(problems):
            if _require_adapter(source.path) is None:
                experts.append(source)
            else:
                gates.append(source.path)
    if gate is not None:
        with gathering(problems):
            if _require_adapter(gate) is None:
                raise ExportError("is a LoRA, not an X-LoRA gate", where=shown_path(gate), code="E_KIND")
    if len(gates) > 1:
        found = ", ".join(shown_path(path) for path in gates)
        problems.append(ExportError("several X-LoRA folders are given", got=found, need="one gate", code="E_KIND"))
    raise_all("--adapters", problems)
    return (gates[0] if gates else None), experts


def _require_adapter(folder: Path) -> Layout | None:
    """The X-LoRA layout of an adapter folder, None for a LoRA; anything else is refused."""
    where = shown_path(folder)
    if not is_folder(folder):
        raise ExportError("is not a folder", where=where, need="a LoRA or X-LoRA folder", code="E_FILE")
    if is_file(folder / PEFT_CONFIG) or is_file(folder / ORIGINAL_CONFIG):
        return layout_of(folder)
    if is_file(folder / "config.json"):
        what, fix = "is a whole model, perhaps with its adapter already merged", "give it as --base, or the adapter"
        raise ExportError(what, where=where, need=f"a folder with {PEFT_CONFIG}", fix=fix, code="E_KIND")
    raise ExportError("holds no adapter", where=where, need=f"{PEFT_CONFIG} or {ORIGINAL_CONFIG}", code="E_FILE")


def _read_experts(bindings: Sequence[Binding], problems: list[InputError]) -> list[LoraFolder]:
    """The folders of all bindings that can be read; a folder named twice is read once."""
    read: dict[Path, LoraFolder] = {}
    for binding in bindings:
        if binding.folder not in read:
            with gathering(problems):
                read[binding.folder] = read_lora(binding.folder)
    return [read[binding.folder] for binding in bindings if binding.folder in read]


def _ungateable(bindings: Sequence[Binding], folders: Sequence[LoraFolder]) -> Iterator[InputError]:
    """Experts that a gate cannot weigh by token."""
    names = {binding.folder: binding.name for binding in bindings}
    for folder in folders:
        where = f"expert {names[folder.folder]} ({shown_path(folder.folder)})"
        fix = "train the expert as a plain LoRA, or build it without the gate"
        if reason := UNGATEABLE.get(folder.fields.kind):
            what = f"a gate cannot mix {folder.fields.kind} experts: {reason}"
            yield ExportError(what, where=where, fix=fix, code="E_UNSUPPORTED")
        if folder.replacements:
            what = "a gate cannot mix an expert that replaces weights of the base"
            yield ExportError(what, where=where, got=listed(folder.replacements), fix=fix, code="E_UNSUPPORTED")


def _count_sites(folders: Sequence[LoraFolder], bindings: Sequence[Binding]) -> int | None:
    """How many modules the experts adapt together; None when one of them could not be read."""
    if len(folders) != len(bindings):
        return None
    return len({path for folder in folders for path in folder.deltas})


def _topk_softmax(gate: GateFolder, asked: TopkSoftmax | None, cache: CacheChoice) -> TopkSoftmax:
    rule = topk_rule(gate, asked)
    if gate.fields.enable_softmax_topk and rule is TopkSoftmax.FLATTENED and cache is CacheChoice.KV:
        raise ExportError(
            "the flattened top-k softmax cannot run with a KV cache: it normalises over all tokens of the batch, so "
            "each new token changes the scalings of those before it",
            where=shown_path(gate.folder), fix="build with --cache none, or --topk-softmax token", code="E_TOPK",
        )  # fmt: skip
    return rule


def _gate_config(gate: GateFolder, classifier: Classifier, rule: TopkSoftmax) -> GateConfig:
    fields = gate.fields
    value = fields.scaling_pass_value
    return GateConfig(
        weights=tuple(classifier.weights),
        biases=tuple(classifier.biases),
        relu=gate.layout is Layout.PEFT or fields.enable_relu_and_dropout,
        layerwise=fields.layerwise_scalings,
        softmax=fields.enable_softmax,
        temperature=fields.softmax_temperature,
        top_k=fields.top_k_lora,
        softmax_topk=fields.enable_softmax_topk,
        topk_softmax=rule,
        scaling_pass_value=1 / len(fields.adapters) if value is None else value,
        global_scaling_weight=fields.global_scaling_weight,
    )


def _expert(binding: Binding, folder: LoraFolder) -> Expert:
    kind, replacements = folder.fields.kind, folder.replacements
    return Expert(binding.name, folder.deltas, binding.key, folder.folder, kind, replacements)


def _origin(binding: Binding, folder: LoraFolder) -> Origin:
    return Origin(
        role=f"expert:{binding.name}",
        folder=folder.folder,
        files=folder.files,
        base_name=folder.fields.base_model_name_or_path,
        is_target=folder.is_target if folder.rule else None,
        is_saved=folder.is_saved,
        shared_rows=folder.shared_rows,
        tied_ends=folder.tied_ends,
    )


def _config_name(gate: GateFolder) -> str:
    return ORIGINAL_CONFIG if gate.layout is Layout.ORIGINAL else PEFT_CONFIG


def _replacement_notes(bindings: Sequence[Binding], folders: Sequence[LoraFolder]) -> list[str]:
    return [
        f"expert {binding.name} replaces {listed(folder.replacements)}: for static builds of {binding.name}=1 only"
        for binding, folder in zip(bindings, folders, strict=True)
        if folder.replacements
    ]


def _mapping_notes(bindings: Sequence[Binding], gate: GateFolder | None) -> list[str]:
    """Column -> key -> name -> folder, printed so that a permuted gate cannot hide."""
    if gate is None:
        return []
    return [
        f"column {column}: key {binding.key} = {binding.name} from {shown_path(binding.folder)}"
        for column, binding in enumerate(bindings)
    ]
