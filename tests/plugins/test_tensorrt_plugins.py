"""The plugin classes inside the real TensorRT for RTX: everything but running them on a GPU."""

from __future__ import annotations

import ctypes
import gc
import lzma
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from plugins.driver import installed_kernels
from plugins.launches import KERNELS, Launch
from plugins.operators import DOMAIN, GATE_SCALINGS, GATED_LOW_RANK, VERSION, GateRules
from plugins.reference import gate_scalings, gated_low_rank
from plugins.tensorrt_plugins import creators, register, unregister
from tests.plugins.interpreter import Interpreter
from tests.plugins.test_kernels import operands

if sys.platform == "darwin":
    pytest.skip("TensorRT for RTX has no macOS package", allow_module_level=True)
RULES = GateRules(softmax=True, temperature=0.5, top_k=2, topk_softmax=True)


class InterpretedKernels:
    """Kernels whose device memory is this process's: pointers are addresses of numpy arrays."""

    def __init__(self, interpreter: Interpreter, arrays: Mapping[int, NDArray[Any]]) -> None:
        self.interpreter = interpreter
        self.arrays = arrays
        self.streams: list[int] = []

    def launch(self, launch: Launch, pointers: Mapping[str, int], stream: int) -> None:
        self.streams.append(stream)
        names = [name for name, kind in KERNELS[launch.kernel].parameters if kind.endswith("*")]
        done = self.interpreter.run([launch], {name: self.arrays[pointers[name]] for name in names})
        for name in names:
            self.arrays[pointers[name]][...] = done[name]


@pytest.fixture
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def described(trt: Any, *shapes: tuple[int, ...]) -> list[Any]:
    return [SimpleNamespace(dims=shape, type=trt.float32) for shape in shapes]


def made(trt: Any, name: str, kernels: Any) -> Any:
    """A plugin as an engine makes it: created from a node's fields, serialised, created again, attached."""
    creator = next(found for found in creators(trt, kernels) if found.name == name)
    fields = [
        trt.PluginField(key, np.array([value], np.float32 if key == "temperature" else np.int64), kind)
        for key, value in (RULES.attributes() if name == GATE_SCALINGS else {}).items()
        for kind in [trt.PluginFieldType.FLOAT32 if key == "temperature" else trt.PluginFieldType.INT64]
    ]
    first = creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    second = creator.create_plugin("node", first.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    return second.attach_to_context(None)


@pytest.fixture
def memory() -> dict[int, NDArray[Any]]:
    return {}


def put(memory: dict[int, NDArray[Any]], array: NDArray[Any]) -> int:
    address = int(array.ctypes.data)
    memory[address] = array
    assert ctypes.c_void_p(address).value == address
    return address


def test_gate_plugin_runs_its_kernel(trt: Any, interpreter: Interpreter, memory: dict[int, NDArray[Any]]) -> None:
    rows = np.random.default_rng(0).normal(0, 2, (2, 3, 4, 5)).astype(np.float32)
    out = np.zeros_like(rows)
    kernels = InterpretedKernels(interpreter, memory)
    plugin = made(trt, GATE_SCALINGS, lambda: kernels)
    assert plugin.rules == RULES
    shapes = described(trt, rows.shape), described(trt, out.shape)
    plugin.enqueue(*shapes, [put(memory, rows)], [put(memory, out)], 0, 77)
    assert kernels.streams == [77]
    assert np.abs(out - gate_scalings(rows, RULES)).max() <= 1e-6


@pytest.mark.parametrize("tokens", [3, 20])
def test_low_rank_plugin_runs_its_kernels(
    trt: Any, interpreter: Interpreter, memory: dict[int, NDArray[Any]], tokens: int
) -> None:
    arrays = operands(tokens, 12, 40, 24, "float32")
    expected = gated_low_rank(**arrays)
    out = np.zeros_like(arrays["base"])
    hidden = np.full((tokens, 12), np.nan, np.float32)
    plugin = made(trt, GATED_LOW_RANK, lambda: InterpretedKernels(interpreter, memory))
    names = ("base", "x", "a", "b", "factors")
    inputs = [put(memory, arrays[name]) for name in names]
    shapes = described(trt, *(arrays[name].shape for name in names)), described(trt, out.shape)
    most = [SimpleNamespace(max=arrays[name].shape) for name in names]
    assert plugin.get_workspace_size(most, []) == hidden.nbytes
    plugin.enqueue(*shapes, inputs, [put(memory, out)], put(memory, hidden), 1)
    assert np.abs(out - expected).max() <= 1e-4
    assert np.abs(expected - arrays["base"]).max() > 1


@pytest.mark.parametrize("error", [ImportError("No module named 'cuda'"), lzma.LZMAError("Corrupt input data")])
def test_a_failing_launch_is_an_exception_and_a_line(
    trt: Any, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorRT drops what a Python enqueue returns: with a number the step would count as done."""

    def no_driver() -> Any:
        raise error

    plugin = made(trt, GATE_SCALINGS, no_driver)
    with pytest.raises(type(error)):
        plugin.enqueue(described(trt, (2, 5)), described(trt, (2, 5)), [1], [2], 0, 0)
    assert caplog.messages == [f"plugin GateScalings: {error}"]


def test_fields_live_as_long_as_their_plugin(trt: Any) -> None:
    """TensorRT reads addresses when it serialises: whatever was put there since would be the engine's rules."""
    plugin = made(trt, GATE_SCALINGS, lambda: None)
    creator = next(found for found in creators(trt, installed_kernels) if found.name == GATE_SCALINGS)
    fields, names = plugin.get_fields_to_serialize(), creator.field_names
    gc.collect()
    others = [np.full(1, 7, dtype) for _ in range(5_000) for dtype in (np.int32, np.float32)]
    values = {field.name: np.asarray(field.data).reshape(-1)[0].item() for field in fields}
    assert values == {name: pytest.approx(value) for name, value in RULES.attributes().items()}
    assert [field.name for field in names] == list(RULES.attributes())
    assert len(others) == 10_000


class Listening:
    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(self, launch: Launch, pointers: Mapping[str, int], stream: int) -> None:
        self.launches.append(launch)


@pytest.mark.parametrize(("offset", "aligned"), [(0, 1), (8, 0)])
def test_tensors_that_begin_anywhere_are_read_number_by_number(trt: Any, offset: int, aligned: int) -> None:
    """Of inner tensors TensorRT promises no alignment, and a wide load from elsewhere ends the context."""
    heard = Listening()
    plugin = made(trt, GATED_LOW_RANK, lambda: heard)
    shapes = described(trt, (1, 64), (1, 32), (8, 32), (8, 64), (1, 8))
    plugin.enqueue(shapes, shapes[:1], [4096, 4096 + offset, 4096, 4096, 4096], [4096], 4096, 0)
    assert [dict(launch.constants)["ALIGNED"] for launch in heard.launches] == [aligned, aligned]


def test_formats(trt: Any) -> None:
    linear = trt.TensorFormat.LINEAR
    gate, low_rank = (made(trt, name, lambda: None) for name in (GATE_SCALINGS, GATED_LOW_RANK))

    def takes(plugin: Any, *types: Any, form: Any = linear) -> bool:
        pairs = [SimpleNamespace(desc=SimpleNamespace(type=type_, format=form)) for type_ in types]
        return all(plugin.supports_format_combination(i, pairs, len(types) - 1) for i in range(len(types)))

    half, full = trt.float16, trt.float32
    assert takes(gate, full, full)
    assert takes(gate, trt.bfloat16, trt.bfloat16)
    assert not takes(gate, half, full)
    assert not takes(gate, trt.int32, trt.int32)
    assert not takes(gate, full, full, form=trt.TensorFormat.CHW32)
    assert takes(low_rank, half, half, half, half, full, half)
    assert not takes(low_rank, half, half, half, half, half, half), "factors are float32"
    assert not takes(low_rank, half, half, full, half, full, half)
    assert low_rank.get_output_data_types([half, half, half, half, full]) == [half]


def test_registered_once_and_forgotten(trt: Any) -> None:
    registry = trt.get_plugin_registry()
    names = (GATE_SCALINGS, GATED_LOW_RANK)
    register(trt)
    register(trt)
    assert all(registry.get_creator(name, VERSION, DOMAIN) is not None for name in names)
    unregister(trt)
    unregister(trt)
    assert all(registry.get_creator(name, VERSION, DOMAIN) is None for name in names)
