"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import time
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
    load: float  # cores that others used just before the run


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
        load=used_cores(),
    )


def memory_pages() -> str:
    """Linux's setting for huge pages, and whether this process and those it starts ask for them."""
    words = ENABLED.read_text().split() if ENABLED.exists() else []
    chosen = next((word.strip("[]") for word in words if word.startswith("[")), "unknown")
    return f"{chosen}, asked for" if f"{TUNABLE}=1" in os.environ.get(VARIABLE, "") else chosen


def used_cores(seconds: float = 2.0) -> float:
    """Cores that were not idle in the next seconds; what a hypervisor took counts. 0 where /proc/stat is missing."""
    before = processor_times()
    time.sleep(seconds)
    spent = [after - began for began, after in zip(before, processor_times(), strict=True)]
    idle = sum(spent[3:5])  # idle, and waiting for a disk
    return (1 - idle / sum(spent)) * (os.cpu_count() or 1) if sum(spent) else 0.0


def processor_times() -> list[int]:
    """Of all cores together, in the kernel's order: user, nice, system, idle, iowait, irq, softirq, steal."""
    stat = Path("/proc/stat")
    return [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]] if stat.exists() else []
