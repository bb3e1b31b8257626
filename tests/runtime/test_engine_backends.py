"""`load(..., backend="trt")`: the tokens of ONNX Runtime, and nothing unfit, damaged or foreign is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import runtime.model
import runtime.tensorrt
from plugins.operators import OPERATORS
from runtime import GenerateOptions, complete, load
from runtime.bundle import open_bundle
from runtime.cli import main
from runtime.engines import Target, engines_root
from runtime.errors import InputError, MachineError
from runtime.gpu import has_driver
from runtime.signature import CacheStyle
from tests.runtime.engine_bundles import SMALL, engines_for, environment
from tests.runtime.fake_tensorrt import VERSION, FakeTensorrt, install, profiles_for, write_engines
from tests.runtime.tiny_bundles import BYTE_SHAPE, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape

PROMPTS = ["hello", [5, 17, 3], "日", "a longer prompt than the others, by far", [1], "é" * 30, "x"]
GREEDY = GenerateOptions(max_new_tokens=12)


def tokens(path: Path, options: GenerateOptions = GREEDY, **how: Any) -> list[tuple[int, ...]]:
    with load(path, threads=1, **how) as model:
        return [completion.token_ids for completion in complete(model, PROMPTS, options)]


@pytest.mark.parametrize("options", [GREEDY, dataclasses.replace(GREEDY, mix={"code": 1.0}, max_new_tokens=70)])
def test_engines_generate_what_onnx_runtime_does(options: GenerateOptions, built: Path, trt: FakeTensorrt) -> None:
    """Two passes and one, prompts in chunks, ragged batches of at most three rows, growth during decoding."""
    assert tokens(built, options, backend="trt") == tokens(built, options)
    assert trt.deserialised == 1


def test_tensorrt_for_rtx_goes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_bundle(tmp_path / "tiny", end=())
    engines_for(path, SMALL, name="trt-rtx-0123456789abcdef", target=Target.TRT_RTX, compute_capabilities=())
    trt = install(monkeypatch, Target.TRT_RTX)
    assert tokens(path, backend="trt-rtx") == tokens(path)
    assert not trt.driver.leaks
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MachineError, match="TensorRT is not installed"):
        load(path, backend="trt")


def test_engines_that_write_their_caches_themselves_do_too(tmp_path: Path, trt: FakeTensorrt) -> None:
    path = tiny_bundle(tmp_path / "tiny", dataclasses.replace(BYTE_SHAPE, cache=CacheStyle.ALIAS), end=())
    engines_for(path, profiles_for(wanted=1))
    assert tokens(path, backend="trt") == tokens(path)


def test_plugins_of_a_plan_are_registered_before_it_is_read(
    tmp_path: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[FakeTensorrt, int, tuple[str, ...]]] = []
    monkeypatch.setattr(
        runtime.model, "register", lambda module, names: seen.append((module, module.deserialised, names))
    )
    path = tiny_bundle(tmp_path / "tiny", end=())
    engines_for(path, SMALL)
    load(path, backend="trt").close()
    assert seen == []
    shutil.rmtree(engines_root(path))
    engines_for(path, SMALL, plugins=OPERATORS)
    load(path, backend="trt").close()
    assert seen == [(trt, 1, OPERATORS)], "after the first engine, before the second"
    shutil.rmtree(engines_root(path))
    engines_for(path, SMALL, plugins=("SomebodysOwn",))
    with pytest.raises(MachineError, match=r"names SomebodysOwn; this version has GateScalings, GatedLowRank"):
        load(path, backend="trt")


def test_a_static_graph_without_gate_or_scalings(built: Path, trt: FakeTensorrt) -> None:
    assert tokens(built, backend="trt", graph="plain") == tokens(built, graph="plain")


def test_a_graph_without_caches(tmp_path: Path, trt: FakeTensorrt) -> None:
    path = tiny_bundle(tmp_path / "tiny", TinyShape(**(vars(BYTE_SHAPE) | {"cache": CacheStyle.NONE})), end=())
    engines_for(path, profiles_for(tokens=150, wanted=1, style="none"))
    assert tokens(path, backend="trt") == tokens(path)


def test_too_long_for_the_engine_names_the_option(built: Path, trt: FakeTensorrt) -> None:
    with load(built, backend="trt") as model:
        assert model.max_positions == 128
        with pytest.raises(InputError, match=r"too long for the engine's context; got 127 .* larger --max-context"):
            complete(model, [[1] * 127], GREEDY)
        assert len(complete(model, [[1] * 127], GenerateOptions())[0].token_ids) == 2


def test_the_command_line_says_what_really_runs(
    built: Path, trt: FakeTensorrt, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(built), "--prompt", "hello", "--max-new-tokens", "5", "--backend", "trt"]
    assert main(words) == 0
    assert f"graph dynamic (dynamic, portable) on TensorRT {VERSION} on Fake GPU; " in capsys.readouterr().err
    assert main([*words, "--provider", "cuda"]) == 2
    assert "providers are ONNX Runtime's; got cuda. Fix: leave it out with trt" in capsys.readouterr().err


# --- which engine is taken


def test_an_engine_built_without_a_gpu_names_neither_gpu_nor_driver(built_copy: Path, trt: FakeTensorrt) -> None:
    shutil.rmtree(engines_root(built_copy))
    engines_for(built_copy, SMALL, device="", driver="", compute_capabilities=())
    load(built_copy, backend="trt").close()
    assert trt.deserialised == 1


def test_the_engine_that_fits_is_found_among_others(built_copy: Path, trt: FakeTensorrt) -> None:
    engines_for(built_copy, SMALL, name="trt-0000000000000000", version="9.0.0.0")
    engines_for(built_copy, SMALL, name="trt-rtx-0000000000000000", target=Target.TRT_RTX)
    load(built_copy, backend="trt").close()
    assert trt.deserialised == 1
    shutil.rmtree(engines_root(built_copy) / "trt-0123456789abcdef")
    engines_for(built_copy, SMALL, name="trt-1111111111111111", driver="1.0")
    with pytest.raises(MachineError) as caught:
        load(built_copy, backend="trt")
    for part in (
        "no engine of graph dynamic",
        "9.0.0.0",
        VERSION,
        "driver's CUDA: the engine's is 1.0, here it is 13.0",
    ):
        assert part in str(caught.value)
    assert "trt-rtx-" not in str(caught.value), "another target's are not asked"
    assert trt.deserialised == 1


def test_no_engine_at_all_names_the_command(built_copy: Path, trt: FakeTensorrt) -> None:
    shutil.rmtree(engines_root(built_copy))
    with pytest.raises(
        MachineError, match=rf"no engine of graph dynamic .* got none at all\. Fix: .* engine {built_copy} --target trt"
    ):
        load(built_copy, backend="trt")


def test_an_engine_folder_without_the_graph_says_so(built_copy: Path, trt: FakeTensorrt) -> None:
    shutil.rmtree(engines_root(built_copy))
    opened = open_bundle(built_copy)
    digest = next(artifact.sha256 for artifact in opened.artifacts("graph") if artifact.path == "plain.onnx")
    write_engines(built_copy, opened.digest, {"plain": ("plain.onnx", digest)}, SMALL)
    with pytest.raises(MachineError, match="holds no engine of graph dynamic"):
        load(built_copy, backend="trt")


# --- machines that lack something


def run_without(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Python code in a process that has neither TensorRT nor cuda-bindings."""
    block = "import sys; sys.modules.update(dict.fromkeys(('tensorrt', 'tensorrt_rtx', 'cuda', 'cuda.bindings'))); "
    command = [sys.executable, "-c", block + code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


def test_everything_imports_without_tensorrt(built: Path) -> None:
    code = (
        "import importlib, pkgutil, runtime; "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(runtime.__path__, 'runtime.') "
        "if not m.name.endswith('__main__')]; "
        "from runtime.cli import main; sys.exit(main(['inspect', sys.argv[1]]))"
    )
    run = run_without(code, built)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"TensorRT {VERSION}" in run.stdout


@pytest.mark.parametrize(("backend", "product"), [("trt", "TensorRT"), ("trt-rtx", "TensorRT for RTX")])
def test_a_missing_package_is_one_line(backend: str, product: str, built: Path) -> None:
    code = "from runtime.cli import main; sys.exit(main(['generate', *sys.argv[1:]]))"
    run = run_without(code, built, "--prompt", "a", "--backend", backend)
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr.startswith(f"error: {product} is not installed (no module tensorrt")
    assert run.stderr.count("\n") == 1


def test_missing_bindings_are_one_line(built: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MachineError, match=r"cuda-bindings is not installed .* Fix: pip install cuda-bindings"):
        load(built, backend="trt")
    assert trt.deserialised == 0


def test_a_missing_driver_is_one_line_before_tensorrt_could_crash(
    built: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.tensorrt, "has_driver", lambda: False)
    monkeypatch.setattr(FakeTensorrt, "Runtime", lambda *_: pytest.fail("would crash"))
    with pytest.raises(MachineError, match=r"TensorRT runs engines only on .* driver\. Fix: use --backend ort here"):
        load(built, backend="trt")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
@pytest.mark.skipif(has_driver(), reason="this machine has a driver")
def test_the_real_tensorrt_for_rtx_without_a_driver_is_one_line(built: Path) -> None:
    words = [sys.executable, "-m", "runtime", "generate", built, "--prompt", "a", "--backend", "trt-rtx"]
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr.startswith("error: TensorRT for RTX runs engines only on a machine with an NVIDIA GPU and driver")
    assert run.stderr.count("\n") == 1
