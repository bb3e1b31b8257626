"""Texts to learn from: JSON lines -> token ids, and which of them are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.errors import ExportError
from runtime import strict_json
from runtime.adapter_folder.files import open_regular, shown_path
from runtime.adapter_folder.problems import shortened
from runtime.errors import InputError, raise_all
from runtime.manifest import Strict
from runtime.text import Text

MAX_BYTES = 256 << 20
MAX_LINE = 1 << 20
NEED = '{"prompt": "...", "completion": "..."} or {"text": "..."}'


class Line(Strict):
    """One line as people write it."""

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingText:
    """Token ids; those from `learned_from` on are to be predicted."""

    ids: tuple[int, ...]
    learned_from: int


def read_texts(
    path: Path, tokenizer: Text, end_token: int | None, longest: int, vocabulary: int | None = None
) -> list[TrainingText]:
    """All lines, or one error that names every bad one. `vocabulary`: a tokenizer may know more tokens than the model.

    A completion is learned with the end token after it; a text from its second token on, without an end.
    """
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ExportError("is too large", where=shown_path(path), need=f"at most {MAX_BYTES} bytes", code="E_DATA")
    texts: list[TrainingText] = []
    problems: list[InputError] = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            text = _encoded(_parsed(line), tokenizer, end_token)
            if not text.learned_from < len(text.ids) <= longest:
                raise ValueError(f"has {len(text.ids)} tokens, of which {text.learned_from} are given")
            if vocabulary is not None and max(text.ids) >= vocabulary:
                raise ValueError(f"has the token {max(text.ids)}, and the model knows 0 to {vocabulary - 1}")
            texts.append(text)
        except ValueError as error:
            got = " ".join(str(error).split())[:200]
            need = f"{NEED}, up to {longest} tokens"
            problems.append(
                ExportError("is no training text", where=f"line {number}", got=got, need=need, code="E_DATA")
            )
    raise_all(shown_path(path), shortened(problems))
    return texts


def _parsed(data: bytes) -> Line:
    line = Line.model_validate(strict_json.parse(data, max_bytes=MAX_LINE))
    given = [name for name, value in line if value is not None]
    if given not in (["prompt", "completion"], ["text"]):
        raise ValueError(f"has {', '.join(given) or 'no field'}")
    return line


def _encoded(line: Line, tokenizer: Text, end_token: int | None) -> TrainingText:
    if line.text is not None:
        return TrainingText(tuple(tokenizer.encode(line.text)), 1)
    prompt = tokenizer.encode(line.prompt or "")
    completion = tokenizer.encode(line.completion or "", specials=False)
    end = [] if end_token is None else [end_token]
    return TrainingText((*prompt, *completion, *end), max(len(prompt), 1))
