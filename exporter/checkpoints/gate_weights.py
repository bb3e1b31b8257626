"""The classifier's Linear layers in both layouts, and the repair of saves that lost some of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from exporter.checkpoints.gate_config import GateFields, GateFolder, Layout
from exporter.checkpoints.weights_file import FLOAT_DTYPES, WeightsFile, is_finite, open_weights
from exporter.errors import ExportError
from runtime.adapter_folder.files import is_file, require_weights, shown_path
from runtime.adapter_folder.problems import gathering, listed, shortened
from runtime.adapter_folder.safetensors_file import TensorEntry
from runtime.errors import InputError, raise_all

PEFT_PREFIX = "base_model.internal_xlora_classifier.layers."


@dataclass(slots=True)
class Classifier:
    """Linear layers in order: weights [out, in] and biases [out] in fp32; `files` are all files that were used."""

    weights: list[torch.Tensor] = field(default_factory=list)
    biases: list[torch.Tensor | None] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_classifier(gate: GateFolder, n_sites: int | None) -> Classifier:
    """Read and check all layers; `n_sites` is the number of modules the experts adapt, None when it is not known."""
    is_peft = gate.layout is Layout.PEFT
    path = require_weights(gate.folder, "adapter_model" if is_peft else "xlora_classifier")
    result = Classifier(files=[path])
    with open_weights(path) as file:
        _Reader(gate, n_sites, file, result).read_all()
    return result


def layer_keys(fields: GateFields, layout: Layout) -> list[str]:
    """The key of each Linear without its ".weight", first to last.

    PEFT counts Linear, ReLU and (with p > 0) Dropout in one Sequential: 0, 3, 6 or 0, 2, 4. The original library has
    ModuleList `inner` (Linear, ReLU, Dropout; or Linear alone) and `last`.
    """
    if layout is Layout.PEFT:
        step = 3 if fields.xlora_dropout_p > 0 else 2
        return [f"{PEFT_PREFIX}{step * index}" for index in range(fields.xlora_depth)]
    step = 3 if fields.enable_relu_and_dropout else 1
    return [*(f"inner.{step * index}" for index in range(fields.xlora_depth - 1)), "last"]


def layer_shapes(fields: GateFields, n_sites: int | None) -> list[tuple[int, int]]:
    """[out, in] of each Linear; out is 0 for the last one when the number of sites is not known."""
    last = len(fields.adapters) * (n_sites or 0) if fields.layerwise_scalings else len(fields.adapters)
    widths = [fields.hidden_size, *[fields.xlora_size] * (fields.xlora_depth - 1), last]
    return [(widths[index + 1], widths[index]) for index in range(fields.xlora_depth)]


class _Reader:
    """One reading of a classifier file."""

    def __init__(self, gate: GateFolder, n_sites: int | None, file: WeightsFile, result: Classifier) -> None:
        self.gate, self.file, self.result = gate, file, result
        self.where = shown_path(file.path)
        self.keys = layer_keys(gate.fields, gate.layout)
        self.shapes = dict(zip(self.keys, layer_shapes(gate.fields, n_sites), strict=True))
        self.has_bias = gate.layout is Layout.PEFT or gate.fields.use_bias
        self.parts = ("weight", "bias") if self.has_bias else ("weight",)

    def read_all(self) -> None:
        """Fill the result, or raise everything that is wrong."""
        problems: list[InputError] = []
        expected = {f"{key}.{part}" for key in self.keys for part in self.parts}
        if extra := sorted(set(self.file.entries) - expected):
            problems.append(self._key_problem("unexpected tensors", extra))
        lost = [key for key in self.keys if any(f"{key}.{part}" not in self.file.entries for part in self.parts)]
        for key in self.keys:
            with gathering(problems):
                found = self._repaired(key) if key in lost else self._layer(self.file, key, key)
                self.result.weights.append(found["weight"])
                self.result.biases.append(found.get("bias"))
        raise_all(self.where, shortened(problems))
        if lost:
            self.result.notes.append(self._repair_note(lost))

    def _layer(self, file: WeightsFile, stored: str, key: str) -> dict[str, torch.Tensor]:
        """The tensors of one Linear, stored in `file` under `stored`."""
        found, problems = {}, list[InputError]()
        rows, columns = self.shapes[key]
        for part, shape in zip(self.parts, ((rows, columns), (rows,)), strict=False):
            with gathering(problems):
                found[part] = _read_checked(file, f"{stored}.{part}", shape)
        raise_all(shown_path(file.path), problems)
        return found

    def _repaired(self, key: str) -> dict[str, torch.Tensor]:
        """A Linear that PEFT 0.20.0 to 0.21.2 dropped on save.

        Saving takes every key with ".<name of another expert>." for that expert's, and the experts are called
        "0", "1", ..: so Linear `layers.k` lies in sub-folder k, its index taken for the adapter name and removed.
        """
        index = key.rpartition(".")[2]
        path = self.gate.folder / index / "adapter_model.safetensors"
        missing = [f"{key}.{part}" for part in self.parts if f"{key}.{part}" not in self.file.entries]
        is_peft_loss = self.gate.layout is Layout.PEFT and len(missing) == len(self.parts)
        if not (is_peft_loss and int(index) < len(self.gate.stored) and is_file(path)):
            raise self._key_problem("gate tensors are missing and cannot be recovered", missing)
        with open_weights(path) as file:
            stored = PEFT_PREFIX.removesuffix(".")
            if any(f"{stored}.{part}" not in file.entries for part in self.parts):
                raise self._key_problem(f"gate tensors are missing, also from {path}", missing)
            self.result.files.append(path)
            return self._layer(file, stored, key)

    def _key_problem(self, what: str, keys: list[str]) -> ExportError:
        return ExportError(
            what, where=self.where, got=listed(ascii(key)[:200] for key in keys),
            need=f"exactly {', '.join(self.keys)} with {' and '.join(self.parts)}",
            fix="PEFT 0.20.0 to 0.21.2 lose gate layers on save: keep the numbered sub-folders beside the file, or "
            "save with PEFT 0.19" if self.gate.layout is Layout.PEFT else "save the checkpoint again",
            code="E_KEYS",
        )  # fmt: skip

    def _repair_note(self, lost: list[str]) -> str:
        names = ", ".join(f"layers.{key.rpartition('.')[2]}" for key in lost)
        folders = ", ".join(f"{key.rpartition('.')[2]}/" for key in lost)
        return f"gate {names} was lost on save (a bug of PEFT 0.20.0 to 0.21.2) and repaired bit-exactly from {folders}"


def _read_checked(file: WeightsFile, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One finite float tensor as fp32; a 0 in `shape` leaves that size open."""
    where, entry = shown_path(file.path), file.entries[key]
    if not _fits(entry, shape):
        raise ExportError(
            f"tensor {key} does not fit the config", where=where, got=f"{entry.dtype} {list(entry.shape)}",
            need=f"a float tensor {[size or 'experts x modules' for size in shape]}",
            fix="check hidden_size, xlora_size, layerwise_scalings and the adapters of the config", code="E_TENSOR",
        )  # fmt: skip
    tensor = file.read(key).float()
    if not is_finite(tensor):
        raise ExportError(f"tensor {key} holds NaN or infinite values", where=where, code="E_VALUE")
    return tensor


def _fits(entry: TensorEntry, shape: tuple[int, ...]) -> bool:
    if entry.dtype not in FLOAT_DTYPES or len(entry.shape) != len(shape):
        return False
    return all(want in (0, got) and got > 0 for want, got in zip(shape, entry.shape, strict=True))
