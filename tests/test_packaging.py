"""The tree as a thing installed: where imports come from, what they load, and that the rules about them bite."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from exporter.cli import main as exporter_main
from runtime.__main__ import main as runtime_start
from runtime.cli import main as runtime_main

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("exporter", "runtime", "plugins")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

ENGINES = {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}
HEAVY = {"torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "accelerate", "safetensors"}


def run_python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_imported_from_this_tree(room: str) -> None:
    file = importlib.import_module(room).__file__
    assert file is not None
    assert Path(file).is_relative_to(ROOT)


def test_console_scripts_reach_the_command_lines() -> None:
    mains = {script.name: script.load() for script in entry_points(group="console_scripts") if "xlora-" in script.name}
    assert mains == {"xlora-export": exporter_main, "xlora-run": runtime_start}


def test_no_module_of_the_runtime_loads_an_engine_or_anything_of_the_export_side(tmp_path: Path) -> None:
    code = (
        "import pkgutil, runtime, sys\n"
        "modules = [m.name for m in pkgutil.walk_packages(runtime.__path__, 'runtime.') if '__main__' not in m.name]\n"
        "assert len(modules) > 20\n"
        "for name in modules: __import__(name)\n"
        "print(*sys.modules)"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "runtime.backends.ort" in loaded
    assert not loaded & (HEAVY | ENGINES | {"exporter"})


@pytest.mark.parametrize(
    "command",
    [
        "exporter",
        "exporter inspect",
        "exporter build",
        "exporter learn-mix",
        "exporter analyze",
        "exporter verify",
        "exporter record",
        "runtime",
        "runtime inspect",
        "runtime generate",
        "runtime compare",
    ],
)
def test_help_comes_from_any_folder_without_heavy_imports(command: str, tmp_path: Path) -> None:
    result = run_python("-X", "importtime", "-m", *command.split(), "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: python -m {command}")
    loaded = set(re.findall(r"\| +([\w.]+)$", result.stderr, re.MULTILINE))
    assert "argparse" in loaded
    assert not loaded & (HEAVY | ENGINES | {"numpy", "tokenizers", "huggingface_hub", "rich"})


def test_every_import_contract_breaks_when_it_is_violated(tmp_path: Path) -> None:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    violations = {
        "exporter/errors.py": "import exporter.cli",
        "exporter/unplaced.py": "",
        "exporter/spec.py": "import peft",
        "runtime/errors.py": "import runtime.cli",
        "runtime/signature.py": "import torch",
        "runtime/backends/null.py": "import runtime.backends.ort",
        "runtime/rows.py": "import plugins.kernels",
        "plugins/__init__.py": "import runtime",
        "plugins/operators.py": "import plugins.driver",
    }
    for file, line in violations.items():
        with (tmp_path / file).open("a") as module:
            module.write(f"\n{line}\n")

    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = run_python("-c", command, "--no-logo", "--no-cache", cwd=tmp_path)
    output = " ".join(result.stdout.split())
    assert result.returncode == 1, result.stdout + result.stderr
    for contract in PYPROJECT["tool"]["importlinter"]["contracts"]:
        assert f"{contract['name']} BROKEN" in output
    assert "exporter.unplaced" in output


def test_everything_beside_the_code_is_package_data() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    shipped = {path for room in patterns for pattern in patterns[room] for path in (ROOT / room).glob(pattern)}
    files = {path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()}
    assert shipped == {path for path in files if path.suffix != ".py" and path.parent.name != "__pycache__"}
    assert ROOT / "exporter" / "tables" / "tensorrt-10.1-operators.tsv" in shipped


def test_every_requirement_has_a_pin_that_meets_it() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for requirement in _requirements():
        pin = versions.get(requirement.name.lower().replace("_", "-"))
        assert pin is not None, f"{requirement.name} has no pin in constraints.txt"
        assert pin in requirement.specifier


def _requirements() -> list[Requirement]:
    """What scripts/setup asks for: everything but the other onnxruntime and the TensorRT that needs a GPU."""
    project = PYPROJECT["project"]
    extras = [words for name, words in project["optional-dependencies"].items() if name not in ("gpu", "tensorrt")]
    groups = [PYPROJECT["build-system"]["requires"], project["dependencies"], *extras]
    return [Requirement(word) for group in groups for word in group]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_documents_name_only_files_that_exist(document: Path) -> None:
    named = set(re.findall(r"(?<![\w/.-])(?:scripts|docs|tests|\.ci)/[\w./-]*\w", document.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "script", ["scripts/setup", "scripts/test", "scripts/check", "scripts/demo", "scripts/gpu_check", ".ci/run"]
)
def test_scripts_can_be_called(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_documents_use_only_commands_and_options_that_exist(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for room, command, rest in _commands(document.read_text(encoding="utf-8")):
        known = _help_of(room, command, capsys)
        unknown = [option for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest) if option not in known]
        assert unknown == [], f"{document.name}: {room} {command}"


def _commands(text: str) -> list[tuple[str, str, str]]:
    """Room, command and the rest of each `python -m ...` or console script line, continued lines joined."""
    lines = text.replace("\\\n", " ")
    found = re.findall(r"(python -m exporter|python -m runtime|xlora-export|xlora-run) ([a-z-]+)([^\n`#]*)", lines)
    rooms = {"xlora-export": "exporter", "xlora-run": "runtime"}
    return [(rooms.get(program, program.split()[-1]), command, rest) for program, command, rest in found]


def _help_of(room: str, command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    main = {"exporter": exporter_main, "runtime": runtime_main}[room]
    arguments: Sequence[str] = [command, "--help"]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    output = capsys.readouterr()
    assert exit_.value.code == 0, f"{room} {command}: {output.err}"
    return set(re.findall(r"--[a-z][a-z-]*", output.out))
