"""JSON from outside, parsed strictly: UTF-8, no duplicate keys, no NaN or infinities, bounded size and nesting."""

from __future__ import annotations

import json
import math
from typing import NoReturn

MAX_VALUES = 250_000  # brackets, braces and commas: bounds the memory a small hostile file can cost


def parse(data: bytes, *, max_bytes: int, max_values: int = MAX_VALUES) -> object:
    """The value of `data`, or a ValueError that says in one line what is wrong with it."""
    check_size(data, max_bytes=max_bytes, max_values=max_values)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from error
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from error


def check_size(data: bytes, *, max_bytes: int, max_values: int) -> None:
    """Raise ValueError for what would cost too much to parse; cheap itself."""
    if len(data) > max_bytes:
        raise ValueError(f"has more than {max_bytes} bytes")
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > max_values:
        raise ValueError(f"holds more than {max_values} values")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object's members; a key that comes twice is refused, since readers differ in which one they take."""
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"has the key {twice[:80]!a} twice")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds a number out of range: {text[:40]}")
    return value
