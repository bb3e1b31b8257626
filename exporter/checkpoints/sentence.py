"""The layout of sentence-transformers: modules.json, and the settings in the folders that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.errors import ExportError
from runtime.adapter_folder.files import is_file, open_regular, shown_path
from runtime.adapter_folder.json_files import MAX_BYTES, parse_object, read_json
from runtime.adapter_folder.problems import shown
from runtime.manifest import Pooling

MODULES_NAME = "modules.json"
# Its first versions named the file after the model; the first that is there counts.
SENTENCE_CONFIGS = tuple(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "xlm-roberta"))
PROMPTS_CONFIG = "config_sentence_transformers.json"
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
    if is_file(folder / PROMPTS_CONFIG):
        _refuse_prompt(folder / PROMPTS_CONFIG)
    pooling = _pooling(folder / paths[1] / "config.json")
    return SentenceSettings(pooling, len(kinds) == len(KNOWN), _length(folder))


def _length(folder: Path) -> int | None:
    """The longest text in tokens, where the folder says."""
    for path in (folder / name for name in SENTENCE_CONFIGS if is_file(folder / name)):
        config = read_json(path)
        if config.get("do_lower_case"):
            raise _unsupported(path, "do_lower_case", "a tokenizer that lowers letters itself")
        length = config.get("max_seq_length")
        if length is not None and not (type(length) is int and length > 0):
            raise _unsupported(path, f"max_seq_length {shown(length)}", "a number above 0")
        return length
    return None


def _refuse_prompt(path: Path) -> None:
    """sentence-transformers puts the default prompt before every text, and some models leave it out of the pooling."""
    config = read_json(path)
    name, prompts = config.get("default_prompt_name"), config.get("prompts")
    prompt = prompts.get(name) if isinstance(name, str) and isinstance(prompts, dict) else name
    if prompt:
        got = f"default_prompt_name {shown(name)}, which puts {shown(prompt)} before every text"
        raise _unsupported(path, got, "none: what a text begins with is part of the text here")


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
