"""scripts/gpu_check without a GPU: its kit, its report, and what it says where nothing can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import scripts.gpu_machine
from runtime.command import run_command
from runtime.engines import Target
from runtime.errors import InputError, MachineError, NumericError
from scripts.gpu_check import ROOT, attempt, main
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
    raise MachineError("CUDAExecutionProvider did not start")


def bare(name: str) -> Section:
    raise ModuleNotFoundError("No module named 'cuda'", name="cuda")


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
        (lacking, Status.NOT_RUN, "CUDAExecutionProvider did not start"),
        (bare, Status.NOT_RUN, "not installed: cuda"),
        (numeric, Status.FAILED, "logits is not finite for row 1"),
        (broken, Status.FAILED, "ZeroDivisionError: oops"),
        (dying, Status.FAILED, "the process died"),
    ],
)
def test_a_section_never_stops_the_others(run: object, status: Status, why: str) -> None:
    section = attempt("one", run)  # type: ignore[arg-type]
    assert section.status is status
    assert why in section.why


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


def test_only_what_ran_can_fail() -> None:
    assert not REPORT.has_failed
    assert Report({}, [*REPORT.sections, Section("x", Status.FAILED, "why")]).has_failed
