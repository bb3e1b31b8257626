"""Engines of real bundles, built by TensorRT for RTX without a GPU; what needs one is refused in plain words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import exporter.build_bundle
import exporter.engines.build
import exporter.engines.plan
import exporter.engines.tensorrt
from exporter import build
from exporter.cli import main
from exporter.engines import EngineSpec, build_engines
from exporter.engines import tensorrt as ours
from exporter.engines.plan import require_signature
from exporter.engines.spec import profiles_of, shapes_of
from exporter.engines.timing_cache import read_timings, write_timings
from exporter.errors import ExportError
from exporter.spec import AdapterSource, BuildSpec, DType
from exporter.watch import StageClock, StageEvent
from runtime.bundle import Bundle, open_bundle
from runtime.engines import Machine, Target, engine_folders, misfits, open_engines, require_fit
from runtime.errors import InputError, MachineError
from runtime.gpu import Gpu
from runtime.inspect import render
from runtime.manifest import Emit, VerifyLevel
from runtime.signature import SignatureShape, signature_from_shape
from runtime.tensorrt import platform_name
from tests.exporter.reseal import reseal
from tests.exporter.tiny_builds import (
    Built,
    named_sources,
    quick,
    write_gate,
    write_lively_base,
    write_lora,
    write_three_experts,
)

pytestmark = pytest.mark.usefixtures("without_twin")

if sys.platform == "darwin":
    pytest.skip("TensorRT for RTX has no macOS package", allow_module_level=True)
RTX = EngineSpec(Target.TRT_RTX, compute_capabilities=("8.6",), max_batch=2, max_tokens=16, max_context=64)
Family = Callable[[str], Built]


@pytest.fixture(scope="module")
def bundle(family_build: Family, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy, since engines lie beside their bundle."""
    return copied(family_build("llama").bundle, tmp_path_factory.mktemp("engines"))


def copied(bundle: Bundle, folder: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(bundle.root, folder / "bundle")))


def machine(**other: Any) -> Machine:
    import tensorrt_rtx

    fields = {
        "target": Target.TRT_RTX, "version": tensorrt_rtx.__version__, "platform": platform_name(),
        "compute_capability": "8.6", "device": "a GPU", "driver": "13.0",
    }  # fmt: skip
    return Machine(**(fields | other))


def test_engines_are_built_beside_the_bundle_and_found_again(bundle: Bundle) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.root.rglob("*")}
    heard: list[StageEvent] = []
    engines = build_engines(bundle, RTX, StageClock(heard.append))
    assert engines.root.parent == bundle.root.parent / "bundle.engines"
    assert engine_folders(bundle.root) == [engines.root]
    assert {path: path.stat().st_mtime_ns for path in bundle.root.rglob("*")} == before, "a bundle is never edited"
    manifest = open_engines(engines.root).manifest
    [plan] = manifest.plans
    assert manifest.bundle == bundle.digest
    assert plan.onnx_sha256 == next(file.sha256 for file in bundle.artifacts("graph"))
    assert [profile.name for profile in plan.profiles] == ["prefill", "decode"]
    assert (manifest.device, manifest.driver) == ("", ""), "built without a GPU"
    weights = sum(file.size for file in bundle.artifacts("weights"))
    assert engines.file("dynamic.plan").stat().st_size > weights / 2, "a plan carries its own weights"
    log = json.loads((engines.root / "build.json").read_text())
    assert log["log"]["dynamic"]
    assert log["seconds"]["engine dynamic"] > 0
    assert any(", 1 of " in event.name for event in heard if event.seconds is None), "TensorRT's progress is told"
    notes: list[str] = []
    again = build_engines(bundle, RTX, StageClock(notes=notes.append))
    assert (again.digest, len(notes)) == (engines.digest, 1)
    assert not misfits(manifest, bundle, machine())


def test_inspect_lists_engines_without_tensorrt(bundle: Bundle, tmp_path: Path) -> None:
    engines = build_engines(bundle, RTX)
    code = (
        "import sys; sys.modules['tensorrt_rtx'] = None; from runtime.cli import main; "
        "sys.exit(main(['inspect', sys.argv[1]]))"
    )
    run = subprocess.run([sys.executable, "-c", code, bundle.root], capture_output=True, text=True, check=True)
    [line] = [line for line in run.stdout.splitlines() if engines.root.name in line]
    assert f"dynamic: TensorRT for RTX {engines.manifest.version} on {engines.manifest.platform}, " in line
    assert "compute capability 8.6, " in line
    assert "ANOTHER" not in line
    copy = copied(bundle, tmp_path)
    moved = Path(shutil.copytree(engines.root, tmp_path / "bundle.engines" / engines.root.name))
    value = json.loads((copy.root / "manifest.json").read_text())
    value["name"] = "renamed"
    (copy.root / "manifest.json").write_text(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n")
    seal(copy.root)
    assert "of ANOTHER BUILD of this bundle" in render(open_bundle(copy.root))
    (moved / "dynamic.plan").write_bytes(b"")
    assert "refused: " in render(open_bundle(copy.root))


def test_a_damaged_engine_is_built_anew(bundle: Bundle) -> None:
    engines = build_engines(bundle, RTX)
    plan = engines.root / "dynamic.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    with pytest.raises(InputError, match="another content than the manifest says"):
        open_engines(engines.root)
    build_engines(bundle, RTX)
    assert open_engines(engines.root).manifest.bundle == bundle.digest


def test_other_settings_are_other_engines(bundle: Bundle) -> None:
    first = build_engines(bundle, RTX)
    other = build_engines(bundle, replace(RTX, compute_capabilities=("12.0", "8.9", "8.6", "8.0"), max_batch=1))
    assert first.root != other.root
    assert other.manifest.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    assert not misfits(other.manifest, bundle, machine(compute_capability="8.9"))


MISFITS = {
    "version": {"version": "1.0.0"},
    "platform": {"platform": "windows-amd64"},
    "compute capability": {"compute_capability": "12.0"},
}


@pytest.mark.parametrize("what", MISFITS)
def test_an_engine_of_elsewhere_is_refused_before_it_is_read(what: str, bundle: Bundle) -> None:
    engines = build_engines(bundle, RTX)
    with pytest.raises(
        MachineError, match=rf"{what}: the engine's is .*, here it is .*exporter engine .*--target trt-rtx"
    ):
        require_fit(engines, bundle, machine(**MISFITS[what]))


def test_an_engine_of_another_bundle_is_refused(bundle: Bundle) -> None:
    engines = build_engines(bundle, RTX)
    other = Bundle(bundle.root, bundle.manifest, "0" * 64, bundle.identities)
    with pytest.raises(MachineError, match=rf"bundle: the engine's is {bundle.digest}, here it is 0000"):
        require_fit(engines, other, machine())


def test_a_forged_manifest_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    root = Path(shutil.copytree(build_engines(bundle, RTX).root, tmp_path / "trt-rtx-0123456789abcdef"))
    path = root / "manifest.json"
    value = json.loads(path.read_text())
    value["plans"][0]["profiles"][0]["ranges"]["B"]["min"] = 9
    path.write_text(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n")
    with pytest.raises(InputError, match="do not match"):
        open_engines(root)
    seal(root)
    with pytest.raises(InputError, match="has no sound range for B"):
        open_engines(root)
    del value["plans"][0]["profiles"][0]["ranges"]["B"]
    path.write_text(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n")
    seal(root)
    with pytest.raises(InputError, match="needs profiles with ranges for B, S and K at least"):
        open_engines(root)


def seal(root: Path) -> None:
    from runtime.sealed_folder import seal_bytes

    (root / "manifest.sha256").write_bytes(seal_bytes((root / "manifest.json").read_bytes()))


def test_an_operator_that_is_refused_is_named(bundle: Bundle, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    model = onnx.load(copy.root / "dynamic.onnx", load_external_data=False)
    logits = next(output for output in model.graph.output if output.name == "logits")
    producer = next(node for node in model.graph.node if "logits" in node.output)
    producer.output[:] = ["plain"]
    model.graph.node.append(helper.make_node("Det", ["plain"], ["unused"], name="the_odd_one"))
    model.graph.node.append(helper.make_node("Identity", ["plain"], [logits.name]))
    onnx.save(model, copy.root / "dynamic.onnx")
    reseal(copy.root)
    with pytest.raises(
        ExportError, match=r"graph dynamic, node the_odd_one: TensorRT for RTX refuses the operator Det"
    ):
        build_engines(open_bundle(copy.root), RTX)
    assert engine_folders(copy.root) == []
    assert not [path for path in (copy.root.parent / "bundle.engines").iterdir() if path.is_dir()]


def test_a_wrong_shape_is_found_by_the_parser(bundle: Bundle, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    model = onnx.load(copy.root / "dynamic.onnx", load_external_data=False)
    bad = helper.make_tensor("bad", TensorProto.FLOAT, [3, 5], np.zeros(15))
    model.graph.initializer.append(bad)
    producer = next(node for node in model.graph.node if "logits" in node.output)
    producer.output[:] = ["plain"]
    model.graph.node.append(helper.make_node("MatMul", ["plain", "bad"], ["logits"], name="misfit"))
    onnx.save(model, copy.root / "dynamic.onnx")
    reseal(copy.root)
    with pytest.raises(ExportError, match=r"node misfit: TensorRT for RTX refuses the operator MatMul|cannot build"):
        build_engines(open_bundle(copy.root), RTX)


def test_ctrl_c_stops_the_build_and_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)

    def interrupt(event: StageEvent) -> None:
        if ": " in event.name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(copy, RTX, StageClock(interrupt))
    assert engine_folders(copy.root) == []


def test_unknown_gpus_and_graphs_are_refused(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["engine", str(bundle.root), "--target", "trt-rtx"]
    assert main([*words, "--compute-capability", "8.7"]) == 2
    assert "got 8.7; need some of 7.5, 8.0" in capsys.readouterr().err
    assert main([*words, "--graph", "other"]) == 2
    assert "the bundle has no graph 'other'" in capsys.readouterr().err
    assert main([*words, "--max-context", "100000"]) == 2
    assert "--max-context: is more than the model has positions; got 100000; need at most" in capsys.readouterr().err
    assert main([*words, "--max-batch", "0"]) == 2
    assert "--max-batch: is too small; got 0; need at least 1" in capsys.readouterr().err


def test_tensorrt_without_package_or_gpu_is_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="TensorRT is not installed"):
        build_engines(bundle, EngineSpec(Target.TRT))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr(ours, "has_driver", lambda: False)
    with pytest.raises(MachineError, match="only on a machine with an NVIDIA GPU and driver"):
        build_engines(bundle, EngineSpec(Target.TRT))
    with pytest.raises(ExportError, match="builds for the GPU of this machine only"):
        build_engines(bundle, EngineSpec(Target.TRT, compute_capabilities=("8.7",)))


def test_no_heavy_module_is_loaded(bundle: Bundle) -> None:
    code = (
        "import sys; from exporter.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'onnx_ir', 'safetensors', 'onnxruntime'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(code or bool(heavy))"
    )
    words = ["engine", str(bundle.root), "--target", "trt-rtx", "--max-tokens", "16", "--max-context", "32"]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "dynamic.plan" in run.stdout


def shape(**other: Any) -> SignatureShape:
    return SignatureShape(
        **({"vocab_size": 32, "kv_heads": (2,), "head_dims": (8,), "scalings": 3, "experts": 2, "gate": True} | other)
    )


def test_profiles_cover_empty_caches_and_steps_without_logits() -> None:
    signature = signature_from_shape(shape())
    graph = SimpleNamespace(signature=signature)
    prefill, decode = profiles_of(graph, EngineSpec(Target.TRT, max_batch=3, max_tokens=100), 80)  # type: ignore[arg-type]
    by_name = {spec.name: spec for spec in signature.inputs}
    assert shapes_of(by_name["input_ids"], prefill) == ((1, 1), (1, 80), (3, 80))
    assert shapes_of(by_name["past_key_0"], decode) == ((1, 2, 0, 8), (1, 2, 80, 8), (6, 2, 80, 8))
    assert shapes_of(by_name["logit_index"], decode) == ((1, 0), (1, 1), (6, 1))
    assert shapes_of(by_name["scalings"], decode) == ((1, 1, 3, 2), (1, 1, 3, 2), (6, 1, 3, 2))


def test_a_build_for_tensorrt_is_linted_before_it_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A modern graph for JetPack 6 is refused by the operators' names, a portable one goes on."""
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    sources = named_sources({"one": write_lora(tmp_path / "one", base, ("q_proj",), 2)})
    spec = replace(quick(sources, base), targets=(Target.TRT,), out=tmp_path / "bundle", verify=VerifyLevel.STRUCTURE)
    assert build(spec).manifest.graphs
    monkeypatch.setattr(exporter.build_bundle, "verify_graphs", lambda *_: pytest.fail("too late"))
    with pytest.raises(
        ExportError, match=r"graph dynamic: the graph uses what TensorRT 10\.3 may not take; got Attention"
    ):
        build(replace(spec, emit=Emit.MODERN, out=tmp_path / "modern"))
    assert not (tmp_path / "modern").exists()


def test_the_parsed_network_must_have_the_signatures_tensors() -> None:
    spec = signature_from_shape(SignatureShape(5, (1,), (2,), scalings=1, experts=2, gate=False))
    names = {"float32": "FLOAT", "int64": "INT64"}

    def network(**odd: Any) -> SimpleNamespace:
        sides = [
            [SimpleNamespace(name=t.name, dtype=SimpleNamespace(name=names[t.dtype]), is_shape_tensor=False) for t in s]
            for s in (spec.inputs, spec.outputs)
        ]
        for tensor in sides[0]:
            vars(tensor).update(odd if tensor.name == "cache_lengths" else {})
        return SimpleNamespace(
            num_inputs=len(sides[0]), num_outputs=len(sides[1]), get_input=sides[0].__getitem__,
            get_output=sides[1].__getitem__,
        )  # fmt: skip

    require_signature(network(), spec, "dynamic")
    for odd, shown in (
        ({"is_shape_tensor": True}, "cache_lengths int64 in host memory"),
        ({"dtype": SimpleNamespace(name="INT32")}, "cache_lengths INT32"),
        ({"name": "lengths"}, "lengths int64"),
    ):
        with pytest.raises(ExportError, match=f"other inputs than the graph's signature; got .*{shown}"):
            require_signature(network(**odd), spec, "dynamic")


def test_one_command_builds_bundle_and_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    lora = write_lora(tmp_path / "one", base, ("q_proj",), 2)
    words = ["build", "--base", str(base), "--adapters", f"one={lora}", "--verify", "structure", "--out"]
    small = ["--target", "ort", "--target", "trt-rtx", "--compute-capability", "8.9", "--max-tokens", "8"]
    assert main([*words, str(tmp_path / "bundle"), *small]) == 0
    [engines] = engine_folders(tmp_path / "bundle")
    assert capsys.readouterr().out.splitlines()[-1] == str(engines)
    assert open_engines(engines).manifest.compute_capabilities == ("8.9",)
    assert main([*words, str(tmp_path / "other"), "--target", "trt"]) == 3
    assert not (tmp_path / "other").exists(), "what is missing is said before the work"


@pytest.mark.parametrize(
    ("dtype", "emit"),
    [
        (DType.FLOAT16, Emit.PORTABLE),
        (DType.BFLOAT16, Emit.MODERN),
        pytest.param(DType.FLOAT16, Emit.MODERN, marks=pytest.mark.long),
        pytest.param(DType.BFLOAT16, Emit.PORTABLE, marks=pytest.mark.long),
    ],
)
def test_half_builds_become_engines(dtype: DType, emit: Emit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strongly typed: the graph's dtypes, the gate in float32. Numbers need a GPU."""
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    experts = write_three_experts(tmp_path / "experts", base, ends=False)
    gate = write_gate(tmp_path / "xlora", base, experts)
    spec = replace(quick(named_sources(experts), base), gate=gate, dtype=dtype, emit=emit, out=tmp_path / "bundle")
    linted: list[str] = []

    def lint(model: Any) -> tuple[()]:
        linted.append(str(next(value.dtype for value in model.graph.outputs if value.name == "logits")))
        return ()

    monkeypatch.setattr(exporter.build_bundle, "lint", lint)
    engines = build_engines(build(spec), RTX)
    [plan] = engines.manifest.plans
    caches = {(profile.ranges["C"].min, profile.ranges["C"].max) for profile in plan.profiles}
    if emit is Emit.MODERN:
        assert caches == {(128, 128)}, "fixed: 64 entries, 16 tokens of padding, in whole grains"
        return
    assert caches == {(0, 64)}
    assert linted == ["FLOAT", {"float16": "FLOAT16", "bfloat16": "BFLOAT16"}[dtype.value]], "what is published too"


def test_a_modern_graph_in_float32_is_refused_by_name(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    sources = named_sources({"one": write_lora(tmp_path / "one", base, ("q_proj",), 2)})
    spec = replace(quick(sources, base), emit=Emit.MODERN, out=tmp_path / "bundle", verify=VerifyLevel.STRUCTURE)
    bundle = build(spec)
    with pytest.raises(ExportError, match="TensorRT for RTX has no Attention operator in float32"):
        build_engines(bundle, RTX)


def test_the_demo_checkpoint_becomes_an_engine(tmp_path: Path) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples" / "four-tasks"
    spec = BuildSpec((AdapterSource(examples / "xlora"),), verify=VerifyLevel.STRUCTURE, out=tmp_path / "bundle")
    bundle = build(spec)
    engines = build_engines(bundle, EngineSpec(Target.TRT_RTX))
    assert engines.manifest.compute_capabilities == ()
    assert not misfits(engines.manifest, bundle, machine(compute_capability="12.1"))
    assert "here it is 7.5" in " ".join(misfits(engines.manifest, bundle, machine(compute_capability="7.5")))


class FullTensorrt:
    """TensorRT for RTX under the other package's name: the same API, so that `--target trt` builds for real."""

    __version__ = "10.3.0"

    def __init__(self) -> None:
        import tensorrt_rtx

        self._module = tensorrt_rtx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu("Orin", "8.7", "12.6")
    monkeypatch.setitem(sys.modules, "tensorrt", FullTensorrt())  # type: ignore[arg-type]
    monkeypatch.setattr(exporter.engines.tensorrt, "has_driver", lambda: True)
    monkeypatch.setattr(exporter.engines.build, "this_gpu", lambda: gpu)
    return gpu


def test_an_engine_of_tensorrt_is_of_this_gpu_and_driver(bundle: Bundle, device: Gpu, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    spec = replace(RTX, target=Target.TRT, compute_capabilities=())
    manifest = build_engines(copy, spec).manifest
    assert (manifest.device, manifest.driver, manifest.compute_capabilities) == ("Orin", "12.6", ("8.7",))
    assert manifest.version == "10.3.0"
    here = Machine(Target.TRT, "10.3.0", manifest.platform, "8.7", "Orin", "12.6")
    assert not misfits(manifest, copy, here)
    [other] = misfits(manifest, copy, replace(here, driver="13.0"))
    assert other == "driver's CUDA: the engine's is 12.6, here it is 13.0"


class TimedConfig:
    """A builder config that keeps timings, as TensorRT's own does; RTX's keeps none."""

    def __init__(self, knows: bytes) -> None:
        self.knows = knows
        self.timings = b""

    def create_timing_cache(self, data: bytes) -> bytes | None:
        return None if data == b"damaged" else data

    def set_timing_cache(self, data: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.timings = data
        return data in (b"", self.knows)

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.timings + b"+")


def test_timings_are_kept_for_this_device_only(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "timings.bin"
    mine = TimedConfig(b"+")
    read_timings(mine, path)
    write_timings(mine, path)
    assert path.read_bytes() == b"+"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    read_timings(mine, path)
    write_timings(mine, path)
    assert path.read_bytes() == b"++"
    path.chmod(0o622)
    read_timings(mine, path)
    assert mine.timings == b"", "somebody else may have written it"
    path.chmod(0o600)
    path.write_bytes(b"damaged")
    read_timings(mine, path)
    assert mine.timings == b""
    other = TimedConfig(b"another GPU's")
    read_timings(other, path)
    assert other.timings == b"", "begun afresh"
    write_timings(other, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["timings.bin"]


def test_an_engine_build_keeps_timings_where_it_is_told(
    bundle: Bundle, device: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Path]] = []
    monkeypatch.setattr(exporter.engines.plan, "read_timings", lambda config, path: calls.append(("read", path)))
    monkeypatch.setattr(exporter.engines.plan, "write_timings", lambda config, path: calls.append(("write", path)))
    copy, path = copied(bundle, tmp_path), tmp_path / "timings.bin"
    build_engines(copy, replace(RTX, timing_cache=path))
    assert calls == [], "TensorRT for RTX measures nothing when it builds"
    build_engines(copy, replace(RTX, target=Target.TRT, compute_capabilities=(), timing_cache=path))
    assert calls == [("read", path), ("write", path)]

    def full(config: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.engines.plan, "write_timings", full)
    spec = replace(RTX, target=Target.TRT, compute_capabilities=(), timing_cache=path, overwrite=True)
    log = json.loads((build_engines(copy, spec).root / "build.json").read_text())["log"]["dynamic"]
    assert "warning: the timings are not kept: [Errno 28] No space left on device" in log, "the engine is there"
