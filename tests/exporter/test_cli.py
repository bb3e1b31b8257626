"""The exporter's commands as a person calls them: what is printed, which exit code, never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.cli import main
from tests.exporter.checkpoint_makers import edit_tensors
from tests.exporter.tiny_builds import Built, write_lively_base, write_lora, write_three_experts

Family = Callable[[str], Built]


@pytest.fixture(scope="module")
def built(family_build: Family) -> Built:
    return family_build("llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base and three plain experts."""
    root = tmp_path_factory.mktemp("plain")
    base = write_lively_base(root / "base")
    return base, write_three_experts(root / "experts", base, ends=False)


def test_build_prints_the_mapping_the_checks_and_the_folder(
    folders: tuple[Path, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = folders
    named = [f"{name}={path}" for name, path in experts.items()]
    out = tmp_path / "bundle"
    words = ["build", "--base", str(base), "--adapters", *named, "--mode", "static", "--mix", "math=0.7,code=0.3"]
    assert main([*words, "--out", str(out), "--verify", "quick"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("column 0  math  from math (key math, rank 2)")
    assert any(line.strip().startswith("kld_mean") and " ok " in line for line in shown)
    assert any("peak memory" in line for line in shown)
    assert shown[-1] == str(out)
    log = json.loads((out / "build.json").read_text())
    assert log["seconds"]["verify"] > 0
    assert log["peak_bytes"]["anonymous"] > 1e6
    # a second build into the same folder is refused and leaves the first as it was
    before = (out / "manifest.json").read_bytes()
    assert main([*words, "--out", str(out), "--verify", "quick"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "manifest.json").read_bytes() == before


def test_verify_alone_needs_no_torch(built: Built) -> None:
    code = (
        "import sys; from exporter.cli import main; code = main(['verify', sys.argv[1]]);"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'onnx_ir', 'safetensors'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(code or bool(heavy))"
    )
    run = subprocess.run([sys.executable, "-c", code, built.bundle.root], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "golden_tokens" in run.stdout


def test_verify_with_sources_runs_every_check(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    sources = ["--base", str(built.checkpoint.base), "--adapters", str(built.checkpoint.xlora)]
    assert main(["verify", str(built.bundle.root), *sources, "--verify", "quick"]) == 0
    shown = capsys.readouterr().out
    assert "against its golden set" in shown
    assert "against its reference forward" in shown


def test_verify_refuses_other_sources(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "base"
    shutil.copytree(built.checkpoint.base, other)
    edit_tensors(other / "model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(0.001))
    sources = ["--base", str(other), "--adapters", str(built.checkpoint.xlora)]
    assert main(["verify", str(built.bundle.root), *sources]) == 2
    assert "is not the file the bundle was built from" in capsys.readouterr().err


def test_verify_sees_a_changed_answer(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A golden set that says something else, re-manifested as an attacker would: the replay notices."""
    from tests.exporter.reseal import reseal

    copy = tmp_path / "bundle"
    shutil.copytree(built.bundle.root, copy)
    golden = json.loads((copy / "golden" / "golden.json").read_text())
    golden["cases"][0]["top_logits"][0][0] += 0.1
    (copy / "golden" / "golden.json").write_text(json.dumps(golden))
    reseal(copy)
    assert main(["verify", str(copy)]) == 2
    assert "golden_logits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build"], "no adapters given"),
        (["build", "--adapters", "NOWHERE"], "NOWHERE"),
        (["build", "--adapters", "NOWHERE", "--mode", "static"], "a static graph needs a mix"),
        (["build", "--adapters", "NOWHERE", "--mix", "a=1"], "a mix is folded into static graphs only"),
        (["build", "--adapters", "NOWHERE", "--emit", "modern", "--cache", "none"], "always has a K/V cache"),
        (["verify", "NOWHERE"], "NOWHERE"),
        (["inspect", "NOWHERE"], "NOWHERE"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    shown = capsys.readouterr()
    assert message in shown.err + shown.out
    assert "Traceback" not in shown.err
    assert list(tmp_path.iterdir()) == []


def test_mistyped_words_are_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["build", "--adapters", "=x"], ["build", "--mode", "dynamik"], ["bild"], []):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    assert "NAME=DIR" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: object) -> int:
        raise RuntimeError("ours")

    monkeypatch.setattr("exporter.commands.inspect.run", broken)
    assert main(["inspect", "x"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_a_terminal_sees_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal each finished stage is one line with seconds and bytes; a pipe gets notes only."""
    from exporter import progress
    from exporter.watch import StageEvent

    class Terminal:
        def __init__(self) -> None:
            self.text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None: ...

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.shown_stages(quiet=False) as clock:
        clock.listener(StageEvent("trace and store", 12.34, 5_000_000))
        clock.notes("gate layer 0 repaired")
    assert "trace and store" in terminal.text
    assert "12.3 s" in terminal.text
    assert "5 MB" in terminal.text
    assert "gate layer 0 repaired" in terminal.text


def test_idle_experts_are_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fresh PEFT adapters have b = 0: the build is right, and hardly what was meant."""
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    fresh = write_lora(tmp_path / "fresh", base, ("q_proj",), 2)
    edit_tensors(fresh / "adapter_model.safetensors", lambda tensors: [tensors[n].zero_() for n in tensors if "B" in n])
    words = ["build", "--base", str(base), "--adapters", f"fresh={fresh}", "--verify", "quick", "--out"]
    assert main([*words, str(tmp_path / "bundle")]) == 0
    assert "graph dynamic: the experts change no logit by more than 0; are they trained" in capsys.readouterr().err


def test_a_bundle_is_told_from_a_checkpoint(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built.bundle.root)]) == 2
    assert f"is a finished bundle. Fix: python -m runtime inspect {built.bundle.root}" in capsys.readouterr().out
