"""Collecting everything that is wrong with a checkpoint before raising once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from pydantic import ValidationError

from runtime.errors import InputError, Problems

SHOWN = 8  # names in one sentence
MOST = 24  # problems in one report; a wrong base makes thousands


@contextmanager
def gathering(problems: list[InputError]) -> Iterator[None]:
    """Append what the block raises to `problems` and go on, so that one look finds all of it."""
    try:
        yield
    except Problems as several:
        problems.extend(several.problems)
    except InputError as one:
        problems.append(one)


def listed(names: Iterable[object], limit: int = SHOWN) -> str:
    """The first names, and how many there are beyond them."""
    every = [str(name) for name in names]
    more = len(every) - limit
    return ", ".join(every[:limit]) + (f" and {more} more" if more > 0 else "")


def shortened(problems: list[InputError]) -> list[InputError]:
    """At most `MOST` problems; the last line then says how many were left out."""
    if len(problems) <= MOST:
        return problems
    left_out = len(problems) - MOST + 1
    return [*islice(problems, MOST - 1), InputError(f"{left_out} more problems of these kinds", code=problems[0].code)]


def shown(value: object) -> str:
    """A value from outside, cut and escaped so that it can stand in one line of an error."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def problems_from_schema(error: ValidationError, where: str) -> list[InputError]:
    """One problem for each value that the schema refused."""
    found: dict[str, InputError] = {}
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"]]
        names = [part for part in parts if not _is_type_name(part)]
        # A value that may be a dict or a list is refused as both; the first reason is enough.
        if names != parts and any(name.split(".")[0] == names[0] for name in found):
            continue
        found[".".join(names)] = InputError(
            f"field {shown('.'.join(names))} is refused: {item['msg']}",
            where=where,
            got=shown(item["input"]),
            fix="correct the value; this file is written by the training tool",
            code="E_CONFIG",
        )
    return list(found.values())


def _is_type_name(part: str) -> bool:
    """Whether pydantic put a member of a union into the location."""
    return part in ("constrained-str", "str", "int") or part.startswith(("dict[", "list["))
