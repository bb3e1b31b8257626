"""Do these adapters belong to this base? Paths, kinds, shapes, targets, gate, saved base tensors: all at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.adapters import AdapterSet, Expert, LoraDelta, Origin
from exporter.checkpoints.base import BaseDescription, ModuleInfo, ModuleKind
from exporter.checkpoints.base_folder import named_folder
from exporter.checkpoints.tied_adapters import tying_problems
from exporter.checkpoints.tying import is_same_tensor, stored_as
from exporter.checkpoints.weights_file import WeightsFile, open_weights
from exporter.errors import ExportError
from runtime.adapter_folder.files import shown_path
from runtime.adapter_folder.json_files import read_json
from runtime.adapter_folder.lora_tensors import saved_base_tensors
from runtime.adapter_folder.problems import gathering, listed, shortened, shown
from runtime.errors import InputError, raise_all

# Where the base an adapter was trained on is still here, these must agree.
SAME_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "n_embd", "n_layer",
)  # fmt: skip

_ROUNDED = "is the base's rounded to another dtype: the base's own is used"


def check_against_base(adapters: AdapterSet, base: BaseDescription) -> list[str]:
    """Notes when the adapters fit the base; otherwise everything that does not fit, raised at once."""
    problems: list[InputError] = []
    for expert in adapters.experts:
        problems.extend(_expert_problems(expert, base))
        problems.extend(_replacement_problems(expert, base))
    notes: list[str] = []
    for origin in adapters.origins:
        problems.extend(_missing_targets(origin, adapters, base))
        problems.extend(_missing_replacements(origin, adapters, base))
        problems.extend(tying_problems(origin, adapters, base))
        problems.extend(_other_base(origin, base, notes))
        with gathering(problems):
            notes.extend(_check_saved_base(origin, adapters, base))
    problems.extend(_gate_problems(adapters, base))
    raise_all(f"adapters on base {base.name}", shortened(problems))
    return list(dict.fromkeys(notes))


def _expert_problems(expert: Expert, base: BaseDescription) -> Iterator[ExportError]:
    """Paths that do not exist, kinds that carry no LoRA, and tensors of other sizes."""
    where = f"expert {expert.name} ({shown_path(expert.folder)})"
    absent = [path for path in expert.deltas if path not in base.modules]
    if absent:
        yield ExportError(
            f"{len(absent)} modules do not exist in the base", where=where, got=listed(absent),
            need=f"modules of a {base.model_type} with {_blocks(base)} blocks",
            fix="give the base the adapter was trained on", code="E_FIT",
        )  # fmt: skip
    for path, delta in expert.deltas.items():
        if path in base.modules:
            yield from _delta_problems(path, delta, base.modules[path], where)


def _delta_problems(path: str, delta: LoraDelta, module: ModuleInfo, where: str) -> Iterator[ExportError]:
    if module.kind is ModuleKind.OTHER:
        yield ExportError(
            f"module {path} is a {module.type_name}", where=where, need="Linear, Embedding or Conv1D", code="E_FIT"
        )
        return
    sizes = (("A", delta.a.shape[1], module.in_features, "in"), ("B", delta.b.shape[0], module.out_features, "out"))
    for side, got, need, name in sizes:
        if got != need:
            yield ExportError(
                f"LoRA {side} of {path} does not fit the base", where=where, got=f"{name} = {got}",
                need=f"{name} = {need}", fix="give the base the adapter was trained on", code="E_FIT",
            )  # fmt: skip


def _replacement_problems(expert: Expert, base: BaseDescription) -> Iterator[ExportError]:
    """Replaced weights that the base lacks or has in another shape, and those that something else changes too."""
    where = f"expert {expert.name} ({shown_path(expert.folder)})"
    for name, new in expert.replacements.items():
        shape = base.shapes.get(name, ())
        size = list(new.values.shape)
        fits = size == list(shape) if new.rows is None else size[1:] == list(shape[1:]) and max(new.rows) < shape[0]
        if not shape or not fits:
            rows = "" if new.rows is None else f" for token ids up to {max(new.rows)}"
            yield ExportError(
                f"the new {name} does not fit the base", where=where, got=f"{size}{rows}", need=str(list(shape)),
                fix="give the base the adapter was trained on; resized vocabularies are not supported", code="E_FIT",
            )  # fmt: skip
        yield from _doubly_changed(expert, name, base, where)


def _doubly_changed(expert: Expert, name: str, base: BaseDescription, where: str) -> Iterator[ExportError]:
    """A weight that the expert replaces and adapts at once; new rows of the embedding may be the head's, too."""
    tying, new = base.tying, expert.replacements[name]
    names, is_rows = [name], new.rows is not None
    if tying is not None and tying.by_peft and tying.head is not None and name == tying.embedding and is_rows:
        head = expert.replacements.get(tying.head)
        if head is None:
            names.append(tying.head)
        elif head.rows is None:
            yield ExportError(
                f"{tying.head} is replaced as a whole and has new rows", where=where, code="E_UNSUPPORTED",
                got=f"token ids of {name}, which are the head's too where config.json ties both", need="one of the two",
            )  # fmt: skip
    both = [path for path in (other.rpartition(".")[0] for other in names) if path in expert.deltas]
    if both:
        yield ExportError(
            f"{name} is replaced and has a LoRA at once", where=where, got=f"a LoRA on {', '.join(both)}",
            need="one of the two", fix="train it with either", code="E_UNSUPPORTED",
        )  # fmt: skip
    if tying is not None and tying.head is not None and tying.head in names and is_rows:
        yield from _biased_head(tying.head, base, where)


def _biased_head(head: str, base: BaseDescription, where: str) -> Iterator[ExportError]:
    """PEFT's TrainableTokensLayer computes a head with new rows without its bias."""
    bias = f"{head.removesuffix('.weight')}.bias"
    if bias in base.shapes:
        yield ExportError(
            f"PEFT drops {bias} where {head} has new rows", where=where, need="a head without a bias",
            fix="train the adapter with modules_to_save", code="E_UNSUPPORTED",
        )  # fmt: skip


def _missing_replacements(origin: Origin, adapters: AdapterSet, base: BaseDescription) -> Iterator[ExportError]:
    """Weights that modules_to_save means in this base, but the file does not hold."""
    replaced = {name for e in adapters.experts if f"expert:{e.name}" == origin.role for name in e.replacements}
    missing = [name for name in base.shapes if name not in replaced and origin.is_saved(name.rpartition(".")[0])]
    if missing:
        yield ExportError(
            f"{len(missing)} weights of modules_to_save have no tensors",
            where=f"{origin.role} ({shown_path(origin.folder)})",
            got=listed(missing), need="all of them in the file", fix="save the adapter again", code="E_FIT",
        )  # fmt: skip


def _missing_targets(origin: Origin, adapters: AdapterSet, base: BaseDescription) -> Iterator[ExportError]:
    """Modules the checkpoint's own rule selects in this base but has no tensors for (a base with more blocks)."""
    experts = {f"expert:{expert.name}": expert for expert in adapters.experts}
    if origin.is_target is None or origin.role not in experts:
        return
    deltas = experts[origin.role].deltas
    targets = (path for path, module in base.modules.items() if module.kind is not ModuleKind.OTHER)
    missing = [path for path in targets if path not in deltas and origin.is_target(path)]
    if missing:
        yield ExportError(
            f"{len(missing)} modules are targets of its config but have no LoRA tensors",
            where=f"{origin.role} ({shown_path(origin.folder)})", got=listed(missing),
            need=f"tensors for every target of a {base.model_type} with {_blocks(base)} blocks",
            fix="give the base the adapter was trained on, or the complete adapter", code="E_FIT",
        )  # fmt: skip


def _other_base(origin: Origin, base: BaseDescription, notes: list[str]) -> Iterator[ExportError]:
    """A recorded base that is still here and built differently is an error; another name alone is a note."""
    if origin.base_name is None:
        return
    folder = named_folder(origin)
    if folder is not None and folder == base.folder.resolve():
        return
    if Path(origin.base_name).name != Path(base.name).name:
        notes.append(f"{origin.role} was trained on {shown(origin.base_name)}, the base given is {shown(base.name)}")
    recorded: dict[str, Any] = {}
    problems: list[InputError] = []
    if folder is not None:
        with gathering(problems):  # the other base is none of our inputs: unreadable, it says nothing
            recorded = read_json(folder / "config.json")
    given = read_json(base.folder / "config.json")
    differing = [name for name in SAME_FIELDS if name in recorded and recorded[name] != given.get(name)]
    if differing:
        yield ExportError(
            "was trained on a base that is built differently", where=f"{origin.role} ({shown_path(origin.folder)})",
            got=", ".join(f"{name} {shown(given.get(name))}" for name in differing),
            need=f"{', '.join(f'{name} {shown(recorded[name])}' for name in differing)} as in {shown_path(folder)}"
            if folder else "", fix="give that base", code="E_FIT",
        )  # fmt: skip


def _gate_problems(adapters: AdapterSet, base: BaseDescription) -> Iterator[ExportError]:
    """The gate reads what the head reads and gives E, or sites * E."""
    gate = adapters.gate
    if gate is None:
        return
    sites = len({path for expert in adapters.experts for path in expert.deltas})
    outputs = len(adapters.experts) * (sites if gate.layerwise else 1)
    if gate.weights[0].shape[1] != base.gate_width:
        got, need = str(gate.weights[0].shape[1]), f"{base.gate_width}, the width of the base's last hidden state"
        yield ExportError("the gate's input does not fit the base", where="gate", got=got, need=need, code="E_FIT")
    if gate.weights[-1].shape[0] != outputs:
        need = f"{outputs} = {len(adapters.experts)} experts" + (f" x {sites} modules" if gate.layerwise else "")
        got = str(gate.weights[-1].shape[0])
        yield ExportError("the gate's outputs do not fit the experts", where="gate", got=got, need=need, code="E_FIT")


def _check_saved_base(origin: Origin, adapters: AdapterSet, base: BaseDescription) -> list[str]:
    """Embeddings and heads that PEFT saved beside a LoRA must be those of the base; else the base was resized."""
    notes: list[str] = []
    problems: list[InputError] = []
    same: dict[str, list[str]] = {"equals the base's": [], _ROUNDED: []}
    replaced = {name for e in adapters.experts if f"expert:{e.name}" == origin.role for name in e.replacements}
    for path in origin.files if origin.role != "gate" else ():
        if path.suffix == ".safetensors":
            with open_weights(path) as file:
                for key, base_key in saved_base_tensors(file).items():
                    if base_key in replaced:
                        continue
                    with gathering(problems):
                        is_exact = _require_same(file, key, base_key, base)
                        same["equals the base's" if is_exact else _ROUNDED].append(base_key)
    raise_all(shown_path(origin.folder), shortened(problems))
    for what, names in same.items():
        notes += [f"{origin.role}: {listed(names)} is saved beside the LoRA and {what}"] if names else []
    return notes


def _require_same(file: WeightsFile, key: str, base_key: str, base: BaseDescription) -> bool:
    """The saved tensor equals the base's one, at least in the narrower of both dtypes; whether it does so exactly."""
    for name in _base_keys(base_key, base):
        for path in base.files:
            with open_weights(path) as stored:
                if name in stored.entries:
                    if not is_same_tensor(file, key, stored, name, rounded=True):
                        raise _differs(file, key, f"its values are not those of {base_key} in the base")
                    return is_same_tensor(file, key, stored, name, rounded=False)
    raise _differs(file, key, f"the base has no {base_key} to compare it with")


def _base_keys(base_key: str, base: BaseDescription) -> tuple[str, ...]:
    """The names a tensor can have in the base's files, in the order to look: its own, then those of its tied twin."""
    twin = base.tying.twin(base_key) if base.tying is not None else None
    names = stored_as(base_key, base.stored_names)
    return names if twin is None else (*names, *stored_as(twin, base.stored_names))


def _differs(file: WeightsFile, key: str, reason: str) -> ExportError:
    return ExportError(
        f"tensor {key} replaces a tensor of the base: {reason}", where=shown_path(file.path),
        fix="give the base the adapter was trained on; resized or retrained embeddings are not supported",
        code="E_FIT",
    )  # fmt: skip


def _blocks(base: BaseDescription) -> int:
    return int(base.text_config.num_hidden_layers)
