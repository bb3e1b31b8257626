"""JSON files from outside: what `runtime.strict_json` checks, and a cap on nesting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runtime import strict_json
from runtime.adapter_folder.files import open_regular, shown_path
from runtime.errors import InputError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ITEMS = 200_000

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKET = re.compile(rb"[^\[\]{}]+")


def read_json(path: Path, *, follow: bool = True) -> dict[str, Any]:
    """The object in a JSON file of at most `MAX_BYTES`."""
    with open_regular(path, follow=follow) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError("is too large", where=shown_path(path), need=f"at most {MAX_BYTES} bytes", code="E_JSON")
    return parse_object(data, shown_path(path))


def parse_object(data: bytes, where: str, max_depth: int = MAX_DEPTH, max_items: int = MAX_ITEMS) -> dict[str, Any]:
    """The JSON object in `data`; everything else is refused."""
    try:
        strict_json.check_size(data, max_bytes=len(data), max_values=max_items)
        _check_nesting(data, where, max_depth)
        value = strict_json.parse(data, max_bytes=len(data), max_values=max_items)
    except ValueError as error:
        what = f"is not valid JSON: it {str(error)[:200]}"
        raise InputError(what, where=where, fix="save or copy the file again", code="E_JSON") from error
    if not isinstance(value, dict):
        raise InputError("is not a JSON object", where=where, got=type(value).__name__, code="E_JSON")
    return value


def _check_nesting(data: bytes, where: str, max_depth: int) -> None:
    """Measure before parsing: Python's parser recurses."""
    depth = 0
    for byte in _NOT_BRACKET.sub(b"", _STRING.sub(b"", data)):
        depth += 1 if byte in b"[{" else -1
        if depth > max_depth:
            raise InputError("is nested too deeply", where=where, need=f"at most {max_depth} levels", code="E_JSON")
