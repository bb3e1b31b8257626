"""Words and options that several commands share; importing this imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias, TypeVar

from exporter.spec import AdapterSource

E = TypeVar("E", bound=StrEnum)
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_sources(command: argparse.ArgumentParser) -> None:
    """What a model is made from: a base, experts, a gate."""
    add = command.add_argument
    add("--base", metavar="DIR_OR_ID", help="default: the base that the adapters' configs name")
    add("--adapters", nargs="+", type=source, default=[], metavar="[[KEY:]NAME=]DIR")
    add("--gate", type=Path, metavar="DIR", help="the gate, when --adapters names the experts one by one")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR|none",
        help="the tokenizer's folder, such as an adapter's (default: base)",
    )


def add_quiet(command: argparse.ArgumentParser) -> None:
    """-q."""
    command.add_argument("-q", "--quiet", action="store_true", help="errors and results only")


def one_of(kind: type[E]) -> Callable[[str], E]:
    """An argparse type that names what may be given."""

    def read(text: str) -> E:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(kind)}") from None

    return read


def share(text: str) -> float:
    """An argparse type: more than 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: need more than 0, at most 1")
    return value


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: need more than 0")
    return value


def count(text: str) -> int:
    """An argparse type: at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """An argparse type: at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}: need at least {least}")
    return value


def source(text: str) -> AdapterSource:
    """DIR, NAME=DIR or KEY:NAME=DIR; a DIR that exists is taken as it stands."""
    if "=" not in text or Path(text).exists():
        return AdapterSource(Path(text))
    name, _, folder = text.partition("=")
    key, colon, rest = name.partition(":")
    if not folder or not name or (colon and not rest):
        raise argparse.ArgumentTypeError(f"{text!r}: need DIR, NAME=DIR or KEY:NAME=DIR")
    return AdapterSource(Path(folder), rest, key) if colon else AdapterSource(Path(folder), name)


def silence_transformers() -> None:
    """Its progress bars would break ours, and its warnings are about other uses of a model."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
