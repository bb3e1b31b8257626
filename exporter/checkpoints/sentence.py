"""The layout of sentence-transformers: modules.json, and the settings in the folders that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExportError
from runtime.adapter_folder.files import is_file, open_regular, shown_path
from runtime.adapter_folder.json_files import MAX_BYTES, parse_object, read_json
from runtime.adapter_folder.problems import shown
from runtime.manifest import Pooling

MODULES_NAME = "modules.json"
SENTENCE_CONFIG = "sentence_bert_config.json"
KNOWN = ("Transformer", "Pooling", "Normalize")  # in this order; the last may be absent
MODES = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_max_tokens": Pooling.MAX,
}


@dataclass(frozen=True, slots=True)
class SentenceSettings:
    """What the layout says of texts and pooling."""

    pooling: Pooling
    normalize: bool
    max_tokens: int | None


def read_sentence(folder: Path) -> SentenceSettings | None:
    """The settings of a sentence-transformers folder, None of another; refuses by name what no graph of ours does."""
    path = folder / MODULES_NAME
    if not is_file(path):
        return None
    kinds, paths = _modules(path)
    if kinds not in (list(KNOWN[:2]), list(KNOWN)) or paths[0] != "":
        raise _unsupported(path, f"modules {', '.join(kinds)}", f"{', '.join(KNOWN[:2])} and perhaps {KNOWN[2]}")
    length: Any = None
    if is_file(folder / SENTENCE_CONFIG):
        config = read_json(folder / SENTENCE_CONFIG)
        if config.get("do_lower_case"):
            raise _unsupported(folder / SENTENCE_CONFIG, "do_lower_case", "a tokenizer that lowers letters itself")
        length = config.get("max_seq_length")
        if length is not None and not (type(length) is int and length > 0):
            raise _unsupported(folder / SENTENCE_CONFIG, f"max_seq_length {shown(length)}", "a number above 0")
    pooling = _pooling(folder / paths[1] / "config.json")
    return SentenceSettings(pooling, len(kinds) == len(KNOWN), length)


def _modules(path: Path) -> tuple[list[str], list[str]]:
    """The kinds and folders of the modules, in order; the file is a bare list."""
    with open_regular(path) as file:
        data = file.read(MAX_BYTES)
    modules = parse_object(b'{"modules":' + data + b"}", shown_path(path))["modules"]
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise _unsupported(path, "no list of modules", "what sentence-transformers writes")
    paths = [str(each.get("path", "")) for each in modules]
    if any("\0" in path or {"", ".", ".."} & set(path.split("/")) for path in paths if path):
        raise _unsupported(path, f"folders {', '.join(map(shown, paths))}", "folders inside this one")
    return [str(each.get("type", "")).rpartition(".")[2] for each in modules], paths


def _pooling(path: Path) -> Pooling:
    """The one mode that is on; newer files name it, older ones have a flag for each."""
    config = read_json(path)
    named = config.get("pooling_mode")
    if named is not None:
        if named not in tuple(Pooling):
            raise _unsupported(path, f"pooling_mode {shown(named)}", " or ".join(Pooling))
        return Pooling(named)
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(on) != 1 or on[0] not in MODES:
        raise _unsupported(path, ", ".join(on) or "no pooling mode", f"one of {', '.join(MODES)}")
    return MODES[on[0]]


def _unsupported(path: Path, got: str, need: str) -> ExportError:
    return ExportError(
        "sentence-transformers settings that have no graph here",
        where=shown_path(path),
        got=got,
        need=need,
        code="E_UNSUPPORTED",
    )
