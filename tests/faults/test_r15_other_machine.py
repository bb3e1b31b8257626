"""R15: an engine of another bundle, version, platform, GPU or driver is refused before it is deserialised."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import runtime.tensorrt
from runtime import load
from runtime.engines import engines_root
from runtime.errors import MachineError
from runtime.sealed_folder import seal_bytes
from tests.runtime.fake_tensorrt import GPU, FakeTensorrt

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
    change: dict[str, Any], built_copy: Path, trt: FakeTensorrt
) -> None:
    [root] = engines_root(built_copy).iterdir()
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
        load(built_copy, backend="trt")
    text = str(caught.value)
    for name, value in change.items():
        for side in (value, was[name]):
            shown = ", ".join(side) if isinstance(side, (tuple, list)) else str(side)
            assert shown in text
    assert f"python -m exporter engine {built_copy} --target trt" in text
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
def test_another_machine_is_refused(gpu: Any, built: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.tensorrt, "this_gpu", lambda: gpu)
    with pytest.raises(MachineError, match=r"the engine's is .*, here it is .*Fix: python -m exporter engine"):
        load(built, backend="trt")
    assert trt.deserialised == 0
