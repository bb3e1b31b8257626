"""What a caller in Python gives, read by a dataclass's own annotations: another type is one error by its field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from runtime.errors import InputError, raise_all

T = TypeVar("T")


def settle(owner: Any, error: type[InputError] = InputError) -> None:
    """Put what the annotations of a frozen dataclass ask for into its fields: a list becomes a tuple, a str a Path.

    For `__post_init__`. Raises `error`, with all fields that hold something else.
    """
    problems: list[InputError] = []
    for name, reader in _readers(type(owner)).items():  # type: ignore[arg-type]  # mypy: a type is not Hashable
        try:
            given = plain(getattr(owner, name))
            read = reader.validate_python(given)
            if isinstance(given, Mapping) and is_dataclass(read):  # its unknown keys would be lost without a word
                kind = type(read).__name__
                problems.append(error(name, got=f"dict {given!a}"[:80], need=f"{kind}(...)"))
            object.__setattr__(owner, name, read)
        except ValidationError as refused:
            problems.append(_problem(name, refused, error))
    raise_all(type(owner).__name__, problems)


def settled(name: str, value: Any, kind: Any, error: type[InputError] = InputError) -> Any:
    """An argument as its annotation `kind` asks for it."""
    try:
        return _reader(kind).validate_python(plain(value))
    except ValidationError as refused:
        raise _problem(name, refused, error) from None


def require_options(options: T | None, kind: type[T]) -> T:
    """The options, or their defaults; InputError for anything but `kind`."""
    if options is None:
        return kind()
    if not isinstance(options, kind):
        got = f"{type(options).__name__} {options!a}"[:80]
        raise InputError("options", got=got, need=f"a {kind.__name__}", fix=f"{kind.__name__}(...)")
    return options


@cache
def _readers(owner: type) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(owner)
    return {field.name: _reader(hints[field.name]) for field in fields(owner)}


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def plain(value: Any) -> Any:
    """A NumPy scalar as Python's own; known by its module, for a command's help is printed without NumPy."""
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar else value


def _problem(name: str, refused: ValidationError, error: type[InputError]) -> InputError:
    """One line: the field, what it was given, and what it takes."""
    found = refused.errors(include_url=False, include_context=False)
    needs = dict.fromkeys(str(item["msg"]).removeprefix("Input should be ") for item in found)
    got = found[0]["input"]
    return error(name, got=f"{type(got).__name__} {got!a}"[:80], need=" or ".join(needs)[:200])
