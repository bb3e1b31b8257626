"""Huge pages for the weights. glibc asks the kernel for them where it is told to, and is told as a process starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FIRST_GLIBC = (2, 35)  # that knows the tunable


def restart_for_huge_pages() -> None:
    """Replace this process by itself with the tunable set, where that gives huge pages: a step reads all weights.

    To be called before anything else is imported or read. Whoever sets the tunable, to 0 for instance, has the say.
    """
    setting, words = huge_page_setting(os.environ), sys.orig_argv[1:]
    if not setting or not sys.executable or not words:
        return
    with suppress(OSError):  # small pages are slower, not wrong
        os.execve(sys.executable, [sys.executable, *words], os.environ | setting)


def huge_page_setting(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that asks for huge pages; none where nothing has to be asked, or nobody would answer."""
    given = environment.get(VARIABLE, "")
    if TUNABLE in given or not is_on_request(ENABLED) or glibc_version() < FIRST_GLIBC:
        return {}
    return {VARIABLE: ":".join(part for part in (given, f"{TUNABLE}=1") if part)}


def is_on_request(enabled: Path) -> bool:
    """Whether Linux gives transparent huge pages to those that ask (`madvise`), not to all or to nobody."""
    try:
        return "[madvise]" in enabled.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def glibc_version() -> tuple[int, ...]:
    """Major and minor; empty with another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, OSError, ValueError):  # no Unix, or no such name
        return ()
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit()) if name == "glibc" else ()
