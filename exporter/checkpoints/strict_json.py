"""JSON from outside: size and depth caps, no duplicate keys, no NaN or infinities."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from exporter.checkpoints.files import open_regular, shown_path
from exporter.checkpoints.problems import shown
from exporter.errors import ExportError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ITEMS = 200_000

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKET = re.compile(rb"[^\[\]{}]+")


class _RefusedError(ValueError):
    """What the hooks raise inside json.loads."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most `MAX_BYTES`."""
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ExportError("is too large", where=shown_path(path), need=f"at most {MAX_BYTES} bytes", code="E_JSON")
    return parse_object(data, shown_path(path))


def parse_object(data: bytes, where: str, max_depth: int = MAX_DEPTH, max_items: int = MAX_ITEMS) -> dict[str, Any]:
    """The JSON object in `data`; everything else is refused."""
    _check_nesting(data, where, max_depth, max_items)
    try:
        # Decoded here: json.loads would guess UTF-16 and UTF-32, where the counts above mean nothing.
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        raise ExportError(
            "is not valid JSON", where=where, got=str(error)[:200], fix="save or copy the file again", code="E_JSON"
        ) from error
    if not isinstance(value, dict):
        raise ExportError("is not a JSON object", where=where, got=type(value).__name__, code="E_JSON")
    return value


def _check_nesting(data: bytes, where: str, max_depth: int, max_items: int) -> None:
    """Count before parsing: Python's parser recurses, and every item costs memory."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") > max_items:
        raise ExportError("holds too many items", where=where, need=f"at most {max_items}", code="E_JSON")
    depth = deepest = 0
    for byte in _NOT_BRACKET.sub(b"", _STRING.sub(b"", data)):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > max_depth:
        raise ExportError("is nested too deeply", where=where, need=f"at most {max_depth} levels", code="E_JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RefusedError(f"duplicate key {shown(next(key for key in keys if keys.count(key) > 1))}")
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise _RefusedError(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(f"{text[:40]} is out of range")
    return value
