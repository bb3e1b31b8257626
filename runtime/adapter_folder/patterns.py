"""PEFT's rules for which modules a config names: target lists and patterns, rank and alpha patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from re import _constants as regex_op  # type: ignore[attr-defined]
from re import _parser as regex_parser  # type: ignore[attr-defined]
from typing import Any, TypeVar

from runtime.adapter_folder.problems import shown
from runtime.errors import InputError

MAX_PATTERN = 1024
# Each open repeat multiplies the work on a path of n characters by up to n; nested ones are exponential.
MAX_REPEATS = 5

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class TargetRule:
    """Which modules a LoRA adapts (peft tuners_utils.check_target_module_exists)."""

    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()  # layers_to_transform; empty: all
    block_patterns: tuple[str, ...] = ()

    def __call__(self, path: str) -> bool:
        """Whether the rule selects the module of this path."""
        if self.excluded and is_named(self.excluded, path):
            return False
        if isinstance(self.targets, str) or path in self.targets:
            return is_named(self.targets, path)
        return is_named(self.targets, path) and (not self.blocks or self._block(path) in self.blocks)

    def _block(self, path: str) -> int | None:
        """The block index in the path: the first number after one of the patterns, or after any name."""
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in self.block_patterns]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
            found = re.match(pattern, path)
            if found:
                return int(found["index"])
        return None


def is_named(names: str | Sequence[str], path: str) -> bool:
    """A string is a pattern for the whole path; of a list, a name is the path or its end after a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def value_for(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value of the first pattern that matches the end of the path (peft utils.other.get_pattern_key)."""
    for pattern, value in patterns.items():
        if _ending_in(pattern).match(path):
            return value
    # PEFT falls back to a literal look-up, for keys that are no pattern of themselves.
    return patterns.get(path, default)


@lru_cache(maxsize=8192)  # re's own cache is too small for one pattern per module
def _ending_in(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def check_pattern(pattern: str, field: str, where: str) -> None:
    """Refuse what is no regular expression, and what could run for ever on one path."""
    if len(pattern) > MAX_PATTERN:
        raise _refused(pattern, field, where, f"at most {MAX_PATTERN} characters")
    try:
        # `re` itself compiles (pattern) in a group, so "a)(b" must not pass.
        re.compile(pattern)
        repeats = _open_repeats(regex_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise _refused(pattern, field, where, f"a regular expression ({error})") from error
    if repeats > MAX_REPEATS:
        raise _refused(pattern, field, where, "no nested repeats or back references, and few .* in a row")


def _open_repeats(tree: Any) -> int:
    """The largest number of open-ended repeats along one way through the pattern; a huge number when nested."""
    total = 0
    for op, argument in tree:
        if op in (regex_op.MAX_REPEAT, regex_op.MIN_REPEAT, regex_op.POSSESSIVE_REPEAT):
            low, high, inner = argument
            nested = _open_repeats(inner)
            # x{1,50}, too, is open in effect; (...)? and fixed counts of one are not.
            is_open = high > 1 and high != low
            total += 99 if nested and high > 1 else nested + is_open
        elif op is regex_op.BRANCH:
            total += max(_open_repeats(branch) for branch in argument[1])
        elif op is regex_op.SUBPATTERN:
            total += _open_repeats(argument[3])
        elif op in (regex_op.ASSERT, regex_op.ASSERT_NOT):
            total += _open_repeats(argument[1])
        elif op in (regex_op.GROUPREF, regex_op.GROUPREF_EXISTS, regex_op.ATOMIC_GROUP):
            total += 99
    return total


def _refused(pattern: str, field: str, where: str, need: str) -> InputError:
    return InputError(
        f"a pattern of {field} is refused", where=where, got=shown(pattern), need=need,
        fix="list the module names instead", code="E_CONFIG",
    )  # fmt: skip
