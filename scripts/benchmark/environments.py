"""The peers' own environments: made when they are missing, left out with the reason when they cannot be made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.benchmark.process import shortened

STAMP = "benchmark-stamp"


@dataclass(frozen=True, slots=True)
class Environment:
    """What pip puts into it, pinned. Without requirements it is the one this script runs in."""

    requirements: tuple[str, ...] = ()


# PEFT runs in ours: it is the tests' oracle there, and another torch would be gigabytes.
ENVIRONMENTS = {
    "ours": Environment(),
    "genai": Environment(("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "numpy==2.4.6")),
    "mistralrs": Environment(("mistralrs==0.9.5",)),
}


class EnvironmentMissingError(Exception):
    """It cannot be had; the text says why."""


@dataclass(frozen=True, slots=True)
class Environments:
    """Environments by name, under one folder."""

    root: Path
    may_install: bool = True
    known: Mapping[str, Environment] = field(default_factory=lambda: ENVIRONMENTS)
    missing: dict[str, EnvironmentMissingError] = field(default_factory=dict)  # tried once a run

    def python(self, name: str) -> str:
        """The interpreter of an environment that is complete, made now if need be."""
        wanted = self.known[name].requirements
        if not wanted:
            return sys.executable
        if name in self.missing:
            raise self.missing[name]
        try:
            return self._ready(name, wanted)
        except EnvironmentMissingError as error:
            self.missing[name] = error
            raise

    def _ready(self, name: str, wanted: tuple[str, ...]) -> str:
        folder = self.root / name
        python = folder / "bin" / "python"
        stamp = folder / STAMP
        if not (stamp.exists() and stamp.read_text() == "\n".join(wanted)):
            if not self.may_install:
                raise EnvironmentMissingError(f"{', '.join(wanted)} is not installed, and --no-install was given")
            _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
            pip = [sys.executable, "-m", "pip", "--python", str(python)]
            _run([*pip, "install", "--quiet", "--only-binary", ":all:", *wanted])
            stamp.write_text("\n".join(wanted))
        return str(python)

    def packages(self, name: str) -> Path:
        """Its site-packages."""
        [folder] = (self.root / name / "lib").glob("python3*/site-packages")
        return folder


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentMissingError(shortened(_reason(done.stderr or done.stdout)))


def _reason(output: str) -> str:
    """pip's own last error, without its warnings."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no message"])[-1]
