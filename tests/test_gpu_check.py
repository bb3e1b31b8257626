"""scripts/gpu_check without a GPU: its kit, its report, and what it says where nothing can run."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import scripts.gpu_check
import scripts.gpu_machine
from exporter.engines import link
from plugins.operators import DTYPES
from runtime.command import run_command
from runtime.engines import Target
from runtime.errors import InputError, MachineError, NumericError
from scripts.gpu_attempt import attempt, require_packages, require_provider
from scripts.gpu_check import ROOT, TEST_PACKAGES, find_models, main, sources_digest
from scripts.gpu_kit import LIBRARIES, MANIFEST, RTX_LIBRARY, SITE, kit_digest, pack, pinned, read_pins, unpack
from scripts.gpu_machine import capabilities, why_not
from scripts.gpu_report import Report, Section, Status, render, write_report

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """What compresses badly, so that there are parts, and the library that needs a link."""
    folder = tmp_path / "payload"
    library = folder / SITE / RTX_LIBRARY
    library.parent.mkdir(parents=True)
    library.write_bytes(bytes(range(256)) * 4)
    (folder / "models").mkdir()
    (folder / "models" / "noise").write_bytes(os.urandom(5000))
    return folder


@pytest.fixture
def kit(payload: Path, tmp_path: Path) -> Path:
    pack(payload, tmp_path / "kit", python=HERE, fast=True, part_bytes=2000)
    return tmp_path / "kit"


def test_a_kit_comes_out_as_it_went_in(payload: Path, kit: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in kit.iterdir())
    assert names == ["kit.000", "kit.001", "kit.002", MANIFEST]
    assert max(path.stat().st_size for path in kit.iterdir()) <= 2000
    unpack(kit, tmp_path / "there")
    for path in payload.rglob("*"):
        if path.is_file():
            assert (tmp_path / "there" / path.relative_to(payload)).read_bytes() == path.read_bytes()
    link = tmp_path / "there" / LIBRARIES / "libtensorrt_rtx.so"
    assert link.resolve() == tmp_path / "there" / SITE / RTX_LIBRARY
    assert not list(tmp_path.glob("*.part"))


def test_the_same_payload_is_the_same_kit(payload: Path, kit: Path, tmp_path: Path) -> None:
    pack(payload, tmp_path / "again", python=HERE, fast=True, part_bytes=2000)
    assert kit_digest(kit) == kit_digest(tmp_path / "again")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def test_damaged_and_missing_parts_are_named_together(kit: Path, tmp_path: Path) -> None:
    damage(kit / "kit.000")
    (kit / "kit.001").unlink()
    (kit / "kit.002").write_bytes(b"short")
    with pytest.raises(
        InputError,
        match=r"kit.000 has another sha256; kit.001 is missing; kit.002 has 5 bytes, need \d+\. Fix: copy these files",
    ):
        unpack(kit, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 2}', '{"format_version": 1, "python": "3.11"}'])
def test_a_folder_that_is_no_kit(text: str, kit: Path, tmp_path: Path) -> None:
    (kit / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=r"kit\.json: no kit"):
        unpack(kit, tmp_path / "there")


def test_a_part_outside_the_kit_is_refused(kit: Path, tmp_path: Path) -> None:
    text = json.loads((kit / MANIFEST).read_text())
    text["parts"][0]["name"] = "../kit.000"
    (kit / MANIFEST).write_text(json.dumps(text))
    with pytest.raises(InputError, match="a part outside the kit"):
        unpack(kit, tmp_path / "there")


def test_a_kit_for_another_python_says_which(payload: Path, tmp_path: Path) -> None:
    pack(payload, tmp_path / "kit", python="3.99", fast=True)
    with pytest.raises(MachineError, match=rf"another Python; got {HERE}; need 3\.99\. Fix: PYTHON=python3\.99"):
        unpack(tmp_path / "kit", tmp_path / "there")


def test_a_kit_is_never_packed_over_another(payload: Path, kit: Path) -> None:
    with pytest.raises(InputError, match="is there already"):
        pack(payload, kit, python=HERE)
    assert run_command(lambda: main(["--pack", str(kit)]), packages="") == 2


def test_packages_are_fetched_at_their_pins() -> None:
    pins = read_pins(ROOT / "constraints.txt")
    assert pinned("tensorrt-rtx-cu13", pins).startswith("tensorrt-rtx-cu13==")
    assert pinned("pydantic_core", pins).startswith("pydantic_core==")
    assert pinned("not-pinned", pins) == "not-pinned"


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    if scripts.gpu_machine.gpu() is not None:
        pytest.skip("this machine has a GPU")
    words = [ROOT / "scripts" / "gpu_check", "--out", tmp_path / "out", "--kit", tmp_path / "kit"]
    run = subprocess.run(
        words, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr.startswith("error: no GPU: no NVIDIA driver answers on this machine. Fix: ")
    assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def on(monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace | None, *targets: Target) -> None:
    monkeypatch.setattr(scripts.gpu_machine, "gpu", lambda: gpu)
    monkeypatch.setattr(scripts.gpu_machine, "find_spec", lambda name: name in [target.module for target in targets])


def test_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="RTX 4090", compute_capability="8.9")
    server = SimpleNamespace(name="H100", compute_capability="9.0")
    on(monkeypatch, None, Target.TRT_RTX)
    assert why_not() == "no GPU: no NVIDIA driver answers on this machine"
    on(monkeypatch, card)
    assert why_not() == "RTX 4090, but no TensorRT is installed (tensorrt or tensorrt_rtx)"
    on(monkeypatch, server, Target.TRT_RTX)
    assert why_not() == "TensorRT for RTX does not list H100 (compute capability 9.0)"
    on(monkeypatch, server, Target.TRT, Target.TRT_RTX)
    assert why_not() is None
    assert scripts.gpu_machine.usable_target() is Target.TRT
    on(monkeypatch, card, Target.TRT_RTX)
    assert why_not() is None
    assert capabilities(Target.TRT_RTX, card) == ("8.9",)
    assert capabilities(Target.TRT_RTX, server) == (), "8.0 and later: the only engine that may load there"


def right(name: str) -> Section:
    return Section(name, Status.OK)


def lacking(name: str) -> Section:
    require_packages("sys", "no_such_package", "no_such_package.either")
    return right(name)


def without_provider(name: str) -> Section:
    require_provider("NoSuchExecutionProvider")
    return right(name)


def refused(name: str) -> Section:
    raise MachineError("TensorRT cannot run the step", code="E_TENSORRT")


def half_installed(name: str) -> Section:
    raise ModuleNotFoundError("No module named 'cuda.gone'", name="cuda.gone")


def hanging(name: str) -> Section:
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(words) as child:
        Path(os.environ["CHILD"]).write_text(str(child.pid))
    return right(name)


def numeric(name: str) -> Section:
    raise NumericError("logits", (1,))


def broken(name: str) -> Section:
    raise ZeroDivisionError("oops")


def dying(name: str) -> Section:
    os.abort()


@pytest.mark.parametrize(
    ("run", "status", "why"),
    [
        (right, Status.OK, ""),
        (lacking, Status.NOT_RUN, "not installed: no_such_package, no_such_package.either"),
        (without_provider, Status.NOT_RUN, "has no NoSuchExecutionProvider, only "),
        (refused, Status.FAILED, "TensorRT cannot run the step"),
        (half_installed, Status.FAILED, "ModuleNotFoundError: No module named 'cuda.gone'"),
        (numeric, Status.FAILED, "logits is not finite for row 1"),
        (broken, Status.FAILED, "ZeroDivisionError: oops"),
        (dying, Status.FAILED, "the process died (exit code -6)"),
    ],
)
def test_a_section_never_stops_the_others(run: object, status: Status, why: str) -> None:
    section = attempt("one", run)  # type: ignore[arg-type]
    assert section.status is status
    assert why in section.why


def test_a_section_that_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    section = attempt("one", hanging, limit=15)
    assert (section.status, section.why) == (Status.FAILED, "took longer than 15 s")
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # until init has taken notice
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("what the section started goes on")


REPORT = Report(
    {"GPU": "H100", "compute capability": "9.0"},
    [
        Section("trt-rtx demo", Status.NOT_RUN, "TensorRT for RTX does not list 9.0; tried: error 9"),
        Section("timing", Status.OK, rows=({"decode ms a token": 0.123456, "by": "a|b"}, {"decode ms a token": 2.0})),
        Section("compare", Status.OK, text="stage B: fine\n"),
    ],
)


def test_the_report_says_what_did_not_run_and_why(tmp_path: Path) -> None:
    page = render(REPORT)
    assert "- GPU: H100\n" in page
    assert "| trt-rtx demo | not run | TensorRT for RTX does not list 9.0; tried: error 9 |" in page
    assert "| decode ms a token | by |\n|---|---|\n| 0.1235 | a\\|b |\n| 2 |  |" in page
    assert "## compare\n\n```\nstage B: fine\n```" in page
    assert "## trt-rtx demo" not in page
    json_path, md_path = write_report(REPORT, tmp_path / "out")
    assert json.loads(json_path.read_text())["sections"][0]["status"] == "not run"
    assert md_path.read_text() == page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a GPU on which no section has anything to do."""
    card = SimpleNamespace(name="RTX 4090", compute_capability="8.9", driver="13.0")
    on(monkeypatch, card)
    monkeypatch.setattr(scripts.gpu_check, "find_models", lambda out: [])
    return card


def test_the_report_is_there_after_every_section(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], bool]] = []

    def attempted(name: str, *_: object, limit: float) -> Section:
        report = json.loads((tmp_path / "report.json").read_text())
        seen.append(([section["name"] for section in report["sections"]], report["is_complete"]))
        assert "**Not complete" in (tmp_path / "report.md").read_text()
        assert limit == 7
        return Section(name, Status.FAILED if name == "plugin kernels" else Status.NOT_RUN, "why")

    monkeypatch.setattr(scripts.gpu_check, "attempt", attempted)
    monkeypatch.setattr(scripts.gpu_check, "lacks_link", lambda: False)
    (tmp_path / "report.json").write_text('{"sections": [{"name": "of an older run"}], "is_complete": true}')
    assert main(["--out", str(tmp_path), "--limit", "7"]) == 2
    names = ["memory bandwidth", "TensorRT", "plugin kernels", "gpu tests"]
    assert seen == [([], False), (names[:2], False), (names[:3], False)]
    report = json.loads((tmp_path / "report.json").read_text())
    assert ([section["name"] for section in report["sections"]], report["is_complete"]) == (names, True)
    assert "Not complete" not in (tmp_path / "report.md").read_text()


def test_a_missing_link_restarts_the_command_once(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process started finds the library, in a folder that the loader is told of, and none in the current one."""
    on(monkeypatch, machine, Target.TRT_RTX)
    monkeypatch.setattr(link, "is_linked", lambda target: False)
    (library := tmp_path / "libtensorrt_rtx.so.1").touch()
    monkeypatch.setattr(link, "library", lambda: library)
    monkeypatch.setattr(scripts.gpu_check, "missing_packages", lambda modules: [])
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    runs: list[list[str]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> SimpleNamespace:
        runs.append(command)
        [folder] = env["LD_LIBRARY_PATH"].split(os.pathsep)
        assert (Path(folder) / link.NAME).resolve() == library
        monkeypatch.setenv("LD_LIBRARY_PATH", env["LD_LIBRARY_PATH"])
        assert not scripts.gpu_check.lacks_link(), "it was of no use, and would be of none again"
        return SimpleNamespace(returncode=42)

    monkeypatch.setattr(link.subprocess, "run", run)
    assert main(["--out", str(tmp_path / "out")]) == 42
    assert [command[1:] for command in runs] == [
        ["-P", str(ROOT / "scripts" / "gpu_check.py"), "--out", str(tmp_path / "out")]
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("before", [None, "", ":", "/a::/b:"])
def test_a_kit_puts_no_empty_entry_on_the_loaders_path(
    before: str | None, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty entry is the current folder, whoever it belongs to."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    if before is not None:
        monkeypatch.setenv("LD_LIBRARY_PATH", before)
    on(monkeypatch, SimpleNamespace(name="RTX 4090", compute_capability="8.9"))
    environments: list[dict[str, str]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> SimpleNamespace:
        environments.append(env)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(scripts.gpu_check.subprocess, "run", run)
    assert main(["--out", str(tmp_path / "out"), "--kit", str(kit)]) == 0
    [environment] = environments
    kept = ["/a", "/b"] if before and "a" in before else []
    first, *rest = environment["LD_LIBRARY_PATH"].split(os.pathsep)
    assert (Path(first).name, rest) == (LIBRARIES, kept)


def test_models_of_other_sources_or_of_a_run_that_was_ended_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make_models(folder: Path, tell: object) -> None:
        (folder / "one").mkdir(parents=True)  # an error where it is there already
        made.append(folder)

    monkeypatch.setitem(sys.modules, "scripts.gpu_models", SimpleNamespace(make_models=make_models))  # type: ignore[arg-type]
    monkeypatch.setattr(scripts.gpu_check, "sources_digest", lambda: "abc")
    (tmp_path / "models-abc.part" / "one").mkdir(parents=True)
    assert find_models(tmp_path) == find_models(tmp_path) == [tmp_path / "models-abc" / "one"]
    assert len(made) == 1
    monkeypatch.setattr(scripts.gpu_check, "sources_digest", lambda: "def")
    assert find_models(tmp_path) == [tmp_path / "models-def" / "one"]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("source", ["exporter/a.py", "runtime/deep/b.py", "examples/four-tasks/base/model.safetensors"])
def test_models_belong_to_their_sources(source: str, tmp_path: Path) -> None:
    before = sources_digest(tmp_path)
    path = tmp_path / source
    path.parent.mkdir(parents=True)
    path.write_bytes(b"1")
    added = sources_digest(tmp_path)
    path.write_bytes(b"2")
    assert len({before, added, sources_digest(tmp_path)}) == 3
    assert sources_digest() == sources_digest()


def imports_of(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def file_of(module: str) -> Path | None:
    place = ROOT / Path(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def test_all_that_the_gpu_tests_import_is_asked_for_first() -> None:
    waiting = [*(ROOT / "tests" / "gpu").glob("*.py"), ROOT / "tests" / "conftest.py"]
    analysis = (ROOT / "exporter" / "analysis").glob("*.py")  # imported when `analyze` runs, which no GPU test does
    seen, foreign = {*waiting, *analysis}, set()
    while waiting:
        for module in imports_of(waiting.pop()):
            if (path := file_of(module)) is not None and path not in seen:
                seen.add(path)
                waiting.append(path)
            foreign.add(module.split(".")[0])
    ours = {"exporter", "plugins", "runtime", "scripts", "tests"}
    optional = {"tensorrt", "tensorrt_rtx", "cuda", "__future__"}  # the tests say so themselves
    assert foreign - ours - optional - set(sys.stdlib_module_names) == {name.split(".")[0] for name in TEST_PACKAGES}


def test_plugins_are_built_in_every_dtype() -> None:
    from scripts import gpu_models
    from tests.gpu import test_engines_on_gpu

    for builds in (gpu_models.BUILDS, test_engines_on_gpu.BUILDS):
        plugins = [settings for settings in builds.values() if "gate_op" in settings and "site_op" in settings]
        assert {settings.get("dtype", "float32") for settings in plugins} == set(DTYPES)


@pytest.mark.parametrize(
    ("python", "answer"),
    [
        ("no-such-python", "error: PYTHON=no-such-python is not there\n"),
        ("fake-python", "fake it is: -P "),
        (__file__, ""),
    ],
)
def test_the_python_that_is_asked_for_is_the_one_that_runs(python: str, answer: str, tmp_path: Path) -> None:
    """By its name as well as by its path."""
    fake = tmp_path / "fake-python"
    fake.write_text('#!/bin/sh\necho "fake it is: $*" >&2\nexit 3\n')
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": python, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run([ROOT / "scripts" / "gpu_check"], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (3, "", 1)
    assert run.stderr.startswith(answer)


def test_only_what_ran_can_fail() -> None:
    assert not REPORT.has_failed
    assert Report({}, [*REPORT.sections, Section("x", Status.FAILED, "why")]).has_failed
