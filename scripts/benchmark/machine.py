"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from runtime.huge_pages import ENABLED, TUNABLE, VARIABLE

PACKAGES = ("onnxruntime", "torch", "transformers", "peft", "numpy")


@dataclass(frozen=True, slots=True)
class Machine:
    """Named in every result."""

    cpu: str
    cores: int
    gibibytes: float
    python: str
    versions: dict[str, str]
    date: str
    pages: str  # which memory pages large buffers get, in all processes of the run
    load: float  # other processes that wanted a core just before the run, averaged over a minute


def this_machine() -> Machine:
    """As of now."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=names[0] if names else platform.processor(),
        cores=len(os.sched_getaffinity(0)),
        gibibytes=round(memory / 2**30, 1),
        python=platform.python_version(),
        versions={package: version(package) for package in PACKAGES},
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        pages=memory_pages(),
        load=os.getloadavg()[0],
    )


def memory_pages() -> str:
    """Linux's setting for huge pages, and whether this process and those it starts ask for them."""
    words = ENABLED.read_text().split() if ENABLED.exists() else []
    chosen = next((word.strip("[]") for word in words if word.startswith("[")), "unknown")
    return f"{chosen}, asked for" if f"{TUNABLE}=1" in os.environ.get(VARIABLE, "") else chosen
