"""`load(..., backend="trt")`: the tokens of ONNX Runtime, and nothing unfit, damaged or foreign is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.tensorrt
from runtime import GenerateOptions, complete, load
from runtime.backends.trt import TrtSession
from runtime.bundle import Bundle, open_bundle
from runtime.cli import main
from runtime.engines import ProfileInfo, Target, engines_root, open_engines
from runtime.errors import InputError, MachineError, UserError
from runtime.gpu import has_driver
from runtime.model import engine_session
from runtime.sealed_folder import seal_bytes
from runtime.session import SessionSettings
from runtime.signature import CacheStyle
from tests.runtime.fake_tensorrt import GPU, VERSION, FakeTensorrt, install, profiles_for, write_engines
from tests.runtime.tiny_bundles import BYTE_SHAPE, tiny_bundle
from tests.runtime.tiny_graphs import TinyShape

PROMPTS = ["hello", [5, 17, 3], "日", "a longer prompt than the others, by far", [1], "é" * 30, "x"]
GREEDY = GenerateOptions(max_new_tokens=12)
SMALL = profiles_for(rows=3, tokens=7, context=120, wanted=1)  # chunks of 7 tokens, batches of 3


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorrt]:
    trt = install(monkeypatch)
    yield trt
    assert not trt.driver.leaks


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and its sound engines."""
    path = tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", end=())
    engines_for(path, SMALL)
    return path


@pytest.fixture
def bundle(plain: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(engines_root(plain), engines_root(tmp_path / "tiny"))
    return Path(shutil.copytree(plain, tmp_path / "tiny"))


def engines_for(path: Path, profiles: tuple[ProfileInfo, ...], **other: Any) -> Path:
    bundle = open_bundle(path)
    digests = {artifact.path: artifact.sha256 for artifact in bundle.artifacts("graph")}
    graphs = {graph.name: (graph.path, digests[graph.path]) for graph in bundle.manifest.graphs}
    return write_engines(path, bundle.digest, graphs, profiles, **other)


def tokens(path: Path, options: GenerateOptions = GREEDY, **how: Any) -> list[tuple[int, ...]]:
    with load(path, threads=1, **how) as model:
        return [completion.token_ids for completion in complete(model, PROMPTS, options)]


@pytest.mark.parametrize("options", [GREEDY, dataclasses.replace(GREEDY, mix={"code": 1.0}, max_new_tokens=70)])
def test_engines_generate_what_onnx_runtime_does(options: GenerateOptions, plain: Path, trt: FakeTensorrt) -> None:
    """Two passes and one, prompts in chunks, ragged batches of at most three rows, growth during decoding."""
    assert tokens(plain, options, backend="trt") == tokens(plain, options)
    assert trt.deserialised == 1


def test_engines_that_write_their_caches_themselves_do_too(tmp_path: Path, trt: FakeTensorrt) -> None:
    path = tiny_bundle(tmp_path / "tiny", dataclasses.replace(BYTE_SHAPE, cache=CacheStyle.ALIAS), end=())
    engines_for(path, profiles_for(wanted=1))
    assert tokens(path, backend="trt") == tokens(path)


def test_a_static_graph_without_gate_or_scalings(plain: Path, trt: FakeTensorrt) -> None:
    assert tokens(plain, backend="trt", graph="plain") == tokens(plain, graph="plain")


def test_a_graph_without_caches(tmp_path: Path, trt: FakeTensorrt) -> None:
    path = tiny_bundle(tmp_path / "tiny", TinyShape(**(vars(BYTE_SHAPE) | {"cache": CacheStyle.NONE})), end=())
    engines_for(path, profiles_for(tokens=150, wanted=1, style="none"))
    assert tokens(path, backend="trt") == tokens(path)


def test_too_long_for_the_engine_names_the_option(plain: Path, trt: FakeTensorrt) -> None:
    with load(plain, backend="trt") as model:
        assert model.max_positions == 120
        with pytest.raises(InputError, match=r"too long for the engine's context; got 119 .* larger --max-context"):
            complete(model, [[1] * 119], GREEDY)
        assert len(complete(model, [[1] * 119], GenerateOptions())[0].token_ids) == 2


def test_the_command_line_says_what_really_runs(
    plain: Path, trt: FakeTensorrt, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(plain), "--prompt", "hello", "--max-new-tokens", "5", "--backend", "trt"]
    assert main(words) == 0
    assert f"graph dynamic (dynamic, portable) on TensorRT {VERSION} on Fake GPU; " in capsys.readouterr().err
    assert main([*words, "--provider", "cuda"]) == 2
    assert "providers are ONNX Runtime's; got cuda. Fix: leave it out with trt" in capsys.readouterr().err


# --- R15: an engine of elsewhere

ALTERED: list[dict[str, Any]] = [
    *({"version": text} for text in ("10.15.1.28", "10.15.1", "10.15.1.290", "10.3.0.26", "11.4.0.106", "8.6.0", "")),
    *({"platform": text} for text in ("linux-aarch64", "windows-amd64", "Linux-x86_64", "linux-x86_64 ", "")),
    *({"compute_capabilities": (text,)} for text in ("8.6", "8.7", "9.0", "11.0", "12.0", "7.5", "18.9")),
    {"compute_capabilities": ("8.6", "12.0")},
    *({"device": text} for text in ("Fake GPU Ti", "fake gpu", "NVIDIA H200", "Orin")),
    *({"driver": text} for text in ("12.6", "13.1", "13", "13.00", "9.9")),
    *({"bundle": text * 64} for text in "0af"),
    {"target": "trt-rtx"},
    {"format_version": 2},
    {"onnx_sha256": "0" * 64},
    {"onnx_sha256": "f" * 64},
    {"version": "10.3.0.26", "driver": "12.6", "device": "Orin", "compute_capabilities": ("8.7",)},
]


@pytest.mark.parametrize("change", ALTERED, ids=str)
def test_an_altered_fingerprint_is_refused_before_deserialising(
    change: dict[str, Any], bundle: Path, trt: FakeTensorrt
) -> None:
    [root] = engines_root(bundle).iterdir()
    manifest = json.loads((root / "manifest.json").read_text())
    was = {name: manifest[name] for name in change if name in manifest}
    for name, value in change.items():
        for holder in manifest["plans"] if name == "onnx_sha256" else [manifest]:
            was.setdefault(name, holder[name])
            holder[name] = value
    data = json.dumps(manifest).encode()
    (root / "manifest.json").write_bytes(data)
    (root / "manifest.sha256").write_bytes(seal_bytes(data))
    with pytest.raises(MachineError) as caught:
        load(bundle, backend="trt")
    text = str(caught.value)
    for name, value in change.items():
        for side in (value, was[name]):
            shown = ", ".join(side) if isinstance(side, (tuple, list)) else str(side)
            assert shown in text
    assert f"python -m exporter engine {bundle} --target trt" in text
    assert caught.value.exit_code == 3
    assert trt.deserialised == 0
    assert not trt.driver.calls, "the GPU was not touched"


def test_the_table_is_long_enough() -> None:
    assert len(ALTERED) >= 30


MACHINES = [
    dataclasses.replace(GPU, name="Other GPU"),
    dataclasses.replace(GPU, driver="12.9"),
    dataclasses.replace(GPU, compute_capability="8.6"),
]


@pytest.mark.parametrize("gpu", MACHINES, ids=str)
def test_another_machine_is_refused(gpu: Any, plain: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.tensorrt, "this_gpu", lambda: gpu)
    with pytest.raises(MachineError, match=r"the engine's is .*, here it is .*Fix: python -m exporter engine"):
        load(plain, backend="trt")
    assert trt.deserialised == 0


def test_an_engine_built_without_a_gpu_names_neither_gpu_nor_driver(bundle: Path, trt: FakeTensorrt) -> None:
    shutil.rmtree(engines_root(bundle))
    engines_for(bundle, SMALL, device="", driver="", compute_capabilities=())
    load(bundle, backend="trt").close()
    assert trt.deserialised == 1


def test_the_engine_that_fits_is_found_among_others(bundle: Path, trt: FakeTensorrt) -> None:
    engines_for(bundle, SMALL, name="trt-0000000000000000", version="9.0.0.0")
    engines_for(bundle, SMALL, name="trt-rtx-0000000000000000", target=Target.TRT_RTX)
    load(bundle, backend="trt").close()
    assert trt.deserialised == 1
    shutil.rmtree(engines_root(bundle) / "trt-0123456789abcdef")
    engines_for(bundle, SMALL, name="trt-1111111111111111", driver="1.0")
    with pytest.raises(MachineError) as caught:
        load(bundle, backend="trt")
    for part in (
        "no engine of graph dynamic",
        "9.0.0.0",
        VERSION,
        "driver's CUDA: the engine's is 1.0, here it is 13.0",
    ):
        assert part in str(caught.value)
    assert trt.deserialised == 1


def test_no_engine_at_all_names_the_command(bundle: Path, trt: FakeTensorrt) -> None:
    shutil.rmtree(engines_root(bundle))
    with pytest.raises(
        MachineError, match=rf"no engine of graph dynamic .* got none at all\. Fix: .* engine {bundle} --target trt"
    ):
        load(bundle, backend="trt")


def test_an_engine_folder_without_the_graph_says_so(bundle: Path, trt: FakeTensorrt) -> None:
    shutil.rmtree(engines_root(bundle))
    opened = open_bundle(bundle)
    digest = next(artifact.sha256 for artifact in opened.artifacts("graph") if artifact.path == "plain.onnx")
    write_engines(bundle, opened.digest, {"plain": ("plain.onnx", digest)}, SMALL)
    with pytest.raises(MachineError, match="holds no engine of graph dynamic"):
        load(bundle, backend="trt")


# --- R16: a damaged or forged engine


def session_of(bundle: Bundle) -> Any:
    return engine_session(bundle, bundle.graph("dynamic"), Target.TRT, SessionSettings(200))


def test_a_thousand_flipped_bytes_are_refused_before_tensorrt_is_called(bundle: Path, trt: FakeTensorrt) -> None:
    opened = open_bundle(bundle)
    [root] = engines_root(bundle).iterdir()
    plan = root / "dynamic.plan"
    good, random = plan.read_bytes(), np.random.default_rng(16)
    for _ in range(1000):
        bad = bytearray(good)
        bad[random.integers(len(bad))] ^= int(random.integers(1, 256))
        plan.write_bytes(bad)
        with pytest.raises(InputError, match=r"changed|another content"):
            session_of(opened)
    assert trt.deserialised == 0
    assert not trt.driver.calls
    plan.write_bytes(good)
    session_of(opened).close()
    assert trt.deserialised == 1


def test_flipped_bytes_of_the_manifest_or_its_seal_are_refused(bundle: Path, trt: FakeTensorrt) -> None:
    opened = open_bundle(bundle)
    [root] = engines_root(bundle).iterdir()
    random = np.random.default_rng(17)
    for name, _ in itertools.product(("manifest.json", "manifest.sha256"), range(100)):
        good = (root / name).read_bytes()
        bad = bytearray(good)
        bad[random.integers(len(bad))] ^= int(random.integers(1, 256))
        (root / name).write_bytes(bad)
        with pytest.raises(UserError, match="do not match"):
            session_of(opened)
        (root / name).write_bytes(good)
    assert trt.deserialised == 0


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing", "linked", "replaced after opening"])
def test_a_plan_that_is_not_the_listed_file_is_refused(
    damage: str, bundle: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    [root] = engines_root(bundle).iterdir()
    plan = root / "dynamic.plan"
    good = plan.read_bytes()
    if damage == "replaced after opening":
        evil = good[:-1] + bytes([good[-1] ^ 1])

        def open_and_swap(*args: Any, **options: Any) -> Any:
            engines = open_engines(*args, **options)
            plan.write_bytes(evil)
            return engines

        monkeypatch.setattr("runtime.engines.open_engines", open_and_swap)
    elif damage in ("shorter", "longer"):
        plan.write_bytes(good[:-1] if damage == "shorter" else good + b"x")
    else:
        plan.rename(root.parent / "elsewhere.plan")
        if damage == "linked":
            plan.symlink_to(root.parent / "elsewhere.plan")
    with pytest.raises(UserError):
        load(bundle, backend="trt")
    assert trt.deserialised == 0


def test_the_bytes_deserialised_are_those_that_were_hashed(bundle: Path, trt: FakeTensorrt) -> None:
    """The file is read once: swapping it after that changes nothing."""
    [root] = engines_root(bundle).iterdir()
    seen: list[bytes] = []
    original = TrtSession.__init__

    def spy(self: TrtSession, plan: bytes, *rest: Any, **more: Any) -> None:
        seen.append(plan)
        (root / "dynamic.plan").write_bytes(b"evil")
        original(self, plan, *rest, **more)

    good = (root / "dynamic.plan").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrtSession, "__init__", spy)
        load(bundle, backend="trt").close()
    assert seen == [good]


# --- R18: nothing that lies in or beside a bundle is loaded as code

CANARIES = ("canary.so", "libcanary_plugin.so", "canary.py", "tensorrt_plugin.py", "sitecustomize.py")
PLACES = ("cwd", "bundle", "engines root", "engine folder")


def test_no_canary_is_ever_loaded(bundle: Path, tmp_path: Path) -> None:
    """20 cases in one process under an audit hook: imports, dlopen, compiled and executed files."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", WATCH, bundle, engines_root(bundle), *CANARIES],
        cwd=cwd, capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    result = json.loads(run.stdout)
    assert result["cases"] == len(CANARIES) * len(PLACES)
    assert result["touched"] == []
    assert result["ran"] == result["cases"] // 2, "beside its folders the engine still runs, within them it is refused"
    assert result["hook works"]


WATCH = """
import ctypes, json, os, sys
from pathlib import Path
import pytest
import tests.runtime.fake_tensorrt as fake
from runtime import GenerateOptions, complete, load
from runtime.errors import UserError
bundle, root, *canaries = sys.argv[1:]
fake.install(pytest.MonkeyPatch())
touched = []
def hook(event, args):
    if event in ("import", "ctypes.dlopen", "exec", "compile"):
        text = " ".join(str(getattr(arg, "co_filename", arg)) for arg in args)
        if "canary" in text or "tensorrt_plugin" in text or "sitecustomize" in text: touched.append((event, text))
sys.addaudithook(hook)
[engine] = Path(root).iterdir()
cases = ran = 0
for place in (Path.cwd(), Path(bundle), Path(root), engine):
    for name in canaries:
        file = place / name
        file.write_text("raise SystemExit('canary')")
        cases += 1
        try:
            with load(bundle, backend="trt") as model:
                complete(model, [[1, 2]], GenerateOptions(max_new_tokens=3))
            ran += 1
        except UserError:
            pass
        file.unlink()
seen = list(touched)
try: ctypes.CDLL("./canary.so")
except OSError: pass
print(json.dumps({"cases": cases, "ran": ran, "touched": seen, "hook works": len(touched) > len(seen)}))
"""


# --- machines that lack something


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def run_without(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Python code in a process that has neither TensorRT nor cuda-bindings."""
    block = "import sys; sys.modules.update(dict.fromkeys(('tensorrt', 'tensorrt_rtx', 'cuda', 'cuda.bindings'))); "
    command = [sys.executable, "-c", block + code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


def test_everything_imports_without_tensorrt(plain: Path) -> None:
    code = (
        "import importlib, pkgutil, runtime; "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(runtime.__path__, 'runtime.') "
        "if not m.name.endswith('__main__')]; "
        "from runtime.cli import main; sys.exit(main(['inspect', sys.argv[1]]))"
    )
    run = run_without(code, plain)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"TensorRT {VERSION}" in run.stdout


@pytest.mark.parametrize(("backend", "product"), [("trt", "TensorRT"), ("trt-rtx", "TensorRT for RTX")])
def test_a_missing_package_is_one_line(backend: str, product: str, plain: Path) -> None:
    code = "from runtime.cli import main; sys.exit(main(['generate', *sys.argv[1:]]))"
    run = run_without(code, plain, "--prompt", "a", "--backend", backend)
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr.startswith(f"error: {product} is not installed (no module tensorrt")
    assert run.stderr.count("\n") == 1


def test_missing_bindings_are_one_line(plain: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MachineError, match=r"cuda-bindings is not installed .* Fix: pip install cuda-bindings"):
        load(plain, backend="trt")
    assert trt.deserialised == 0


def test_a_missing_driver_is_one_line_before_tensorrt_could_crash(
    plain: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.tensorrt, "has_driver", lambda: False)
    monkeypatch.setattr(FakeTensorrt, "Runtime", lambda *_: pytest.fail("would crash"))
    with pytest.raises(MachineError, match=r"TensorRT runs engines only on .* driver\. Fix: use --backend ort here"):
        load(plain, backend="trt")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
@pytest.mark.skipif(has_driver(), reason="this machine has a driver")
def test_the_real_tensorrt_for_rtx_without_a_driver_is_one_line(plain: Path) -> None:
    words = [sys.executable, "-m", "runtime", "generate", plain, "--prompt", "a", "--backend", "trt-rtx"]
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr.startswith("error: TensorRT for RTX runs engines only on a machine with an NVIDIA GPU and driver")
    assert run.stderr.count("\n") == 1
