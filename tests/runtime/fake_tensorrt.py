"""A `tensorrt` whose contexts compute by ONNX Runtime on the fake GPU's pointers, as strict as the real one."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import runtime.tensorrt
from runtime.backends.trt import TrtSession
from runtime.engines import (
    ENGINE_FORMAT_VERSION,
    EngineManifest,
    PlanFile,
    PlanInfo,
    ProfileInfo,
    Range,
    Target,
    engines_root,
)
from runtime.gpu import Gpu
from runtime.sealed_folder import manifest_bytes, seal_bytes
from runtime.session import SessionSettings
from tests.runtime.fake_cuda import FakeDriver
from tests.runtime.tiny_graphs import TinyShape, tiny_model

MAGIC = b"FAKE PLAN\n"
VERSION = "10.15.1.29"
GPU = Gpu("Fake GPU", "8.9", "13.0")
SCRATCH = 4096
_NAMES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    INFO, ERROR = Severity.INFO, Severity.ERROR


class ExecutionContextAllocationStrategy(Enum):
    STATIC, USER_MANAGED = range(2)


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(Enum):
    DEVICE, HOST = range(2)


DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT64"])


@dataclass
class FakeTensorrt:
    """The module. `deserialised` counts how often it saw an engine's bytes."""

    driver: FakeDriver
    __version__: str = VERSION
    deserialised: int = 0
    registered: list[str] = field(default_factory=list)
    enqueued: int = 0
    is_capturable: bool = True
    breaks_capture: bool = False
    host_tensor: str = ""  # an input that this TensorRT wants in host memory
    copies_caches: bool = False
    alive: int = 0  # runtimes, engines, contexts
    torn: int = 0  # contexts that went while their work waited

    ILogger, TensorIOMode, TensorLocation = ILogger, TensorIOMode, TensorLocation
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def Runtime(self, logger: Any) -> Runtime:
        self.driver.require_context()
        return Runtime(self, logger)


class Counted:
    def __init__(self, trt: FakeTensorrt) -> None:
        self.trt = trt
        trt.alive += 1

    def __del__(self) -> None:
        self.trt.alive -= 1


class Runtime(Counted):
    def __init__(self, trt: FakeTensorrt, logger: Any) -> None:
        super().__init__(trt)
        self.logger, self.engine_host_code_allowed = logger, True

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        self.trt.deserialised += 1
        assert not self.engine_host_code_allowed
        if not plan.startswith(MAGIC):
            self.logger.log(Severity.ERROR, "Serialization assertion magicTag failed")
            return None
        header, _, model = plan[len(MAGIC) :].partition(b"\n")
        return Engine(self, json.loads(header), model)


class Engine(Counted):
    def __init__(self, runtime: Runtime, header: dict[str, Any], model: bytes) -> None:
        super().__init__(runtime.trt)
        self.runtime, self.logger, self.profiles = runtime, runtime.logger, header["profiles"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.nodes = self.inputs | self.outputs
        self.num_io_tensors, self.num_optimization_profiles = len(self.nodes), len(self.profiles)

    def get_tensor_name(self, number: int) -> str:
        return list(self.nodes)[number]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[_NAMES[self.nodes[name].type]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name == self.trt.host_tensor else TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.nodes[name].shape)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        is_cache = name.startswith("present") and self.nodes[name].shape[2] == "C"
        return name.replace("present", "past") if is_cache and not self.trt.copies_caches else None

    def get_device_memory_size_for_profile_v2(self, number: int) -> int:
        return SCRATCH * (number + 1)

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class Context(Counted):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.trt)
        self.engine, self.driver = engine, engine.trt.driver
        self.profile: int | None = None
        self.scratch = (0, 0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.state = 0  # moves whenever a captured graph would go stale
        self.settled = -1  # the state of the last ordinary enqueue

    def __del__(self) -> None:
        super().__del__()
        self.trt.torn += bool(self.driver.queue)

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self.profile = number
        return 0 <= number < len(self.engine.profiles)

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 512 == 0
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile or 0)
        self.driver.view(address, size)
        self.scratch, self.state = (address, size), self.state + 1

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        assert self.profile is not None
        ranges = self.engine.profiles[self.profile]
        known = self.engine.inputs[name].shape
        for size, want in zip(shape, known, strict=True):
            least, most = (want, want) if isinstance(want, int) else ranges[want]
            if not least <= size <= most:
                self._log(f"Static dimension mismatch while setting input shape of {name}")
                return False
        self.shapes[name], self.state = tuple(shape), self.state + 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if not address or address % 256 or name not in self.engine.nodes:
            self._log(f"Invalid address of {name}")
            return False
        self.addresses[name], self.state = address, self.state + 1
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.trt.is_capturable

    def execute_async_v3(self, stream: int) -> bool:
        self.driver.require_context()
        self.engine.trt.enqueued += 1
        sizes = self._sizes()
        if self.scratch[0] == 0 or self.addresses.keys() != self.engine.nodes.keys():
            self._log("Address is not set")
            return False
        for name in self.engine.outputs:
            if (source := self.engine.get_aliased_input_tensor(name)) is not None:
                assert self.addresses[name] == self.addresses[source], "an aliased output needs its input's address"
        state, addresses, shapes = self.state, dict(self.addresses), dict(self.shapes)
        is_capturing = self.driver.recording is not None
        if is_capturing and (self.settled != state or self.engine.trt.breaks_capture):
            self.driver.is_capture_broken = True  # as when TensorRT has yet to act on new shapes
            return False
        self.settled = state

        def run() -> None:
            assert not is_capturing or self.state == state, "the context changed under its captured graph"
            feeds = {name: self._tensor(name, shape, addresses[name]).copy() for name, shape in shapes.items()}
            self.driver.view(*self.scratch).fill(0xFF)
            for name, array in zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True):
                wanted = tuple(sizes.get(size, size) for size in self.engine.outputs[name].shape)
                assert array.shape == wanted
                self._tensor(name, wanted, addresses[name])[...] = array

        self.driver.enqueue(run)
        return True

    def _sizes(self) -> dict[str, int]:
        """One size for each symbol, the same in all inputs."""
        assert self.shapes.keys() == self.engine.inputs.keys(), "an input has no shape"
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            for size, symbol in zip(shape, self.engine.inputs[name].shape, strict=True):
                if isinstance(symbol, str):
                    assert sizes.setdefault(symbol, size) == size, f"{symbol} is both {sizes[symbol]} and {size}"
        return sizes

    def _tensor(self, name: str, shape: Sequence[int], address: int) -> np.ndarray:
        dtype = np.dtype(_NUMPY[_NAMES[self.engine.nodes[name].type]])
        size = int(np.prod(shape)) * dtype.itemsize
        return self.driver.view(address, size).view(dtype).reshape(shape) if size else np.empty(shape, dtype)

    def _log(self, message: str) -> None:
        self.engine.logger.log(Severity.ERROR, message)


def install(monkeypatch: pytest.MonkeyPatch, target: Target = Target.TRT) -> FakeTensorrt:
    """A machine with a GPU, a driver and TensorRT, for one test."""
    driver = FakeDriver()
    trt = FakeTensorrt(driver)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, target.module, trt)  # type: ignore[arg-type]
    monkeypatch.setattr(runtime.tensorrt, "has_driver", lambda: True)
    monkeypatch.setattr(runtime.tensorrt, "this_gpu", lambda: GPU)
    return trt


def profiles_for(
    rows: int = 6, tokens: int = 200, context: int = 300, wanted: int = 200, style: str = "append"
) -> tuple[ProfileInfo, ...]:
    """Prefill and decode, wide enough for tests that ask for every logit."""

    def ranges(rows: int, tokens: int) -> dict[str, Range]:
        most = {"B": rows, "S": tokens, "C": context, "K": wanted}
        return {name: Range(min=int(name in "BS"), opt=1, max=size) for name, size in most.items()}

    if style == "none":
        whole = {name: r for name, r in ranges(1, tokens).items() if name != "C"}
        return (ProfileInfo(name="whole", ranges=whole),)
    return ProfileInfo(name="prefill", ranges=ranges(rows, tokens)), ProfileInfo(
        name="decode", ranges=ranges(2 * rows, 1)
    )


def plan_bytes(model: bytes, profiles: Sequence[ProfileInfo]) -> bytes:
    """What the fake deserialises."""
    header = {
        "profiles": [{name: (r.min, r.max) for name, r in profile.ranges.items()} for profile in profiles]
    }  # fmt: skip
    return MAGIC + json.dumps(header).encode() + b"\n" + model


def open_fake(
    shape: TinyShape, weights: dict[str, np.ndarray], profiles: Sequence[ProfileInfo] | None = None
) -> TrtSession:
    """A session on the tiny decoder."""
    profiles = profiles or profiles_for(style=shape.cache)
    plan = plan_bytes(tiny_model(shape, weights).SerializeToString(), profiles)
    return TrtSession(plan, shape.signature, SessionSettings(shape.max_positions), profiles, Target.TRT)


def write_engines(
    bundle: Path,
    digest: str,
    graphs: Mapping[str, tuple[str, str]],
    profiles: Sequence[ProfileInfo] | None = None,
    name: str = "trt-0123456789abcdef",
    plugins: tuple[str, ...] = (),
    **other: Any,
) -> Path:
    """A sealed engine folder for graphs by name, each with its ONNX file and that file's digest."""
    profiles = profiles or profiles_for()
    root = engines_root(bundle) / name
    root.mkdir(parents=True, exist_ok=True)
    plans, files = [], []
    for graph, (onnx, onnx_digest) in graphs.items():
        data = plan_bytes((bundle / onnx).read_bytes(), profiles)
        path = f"{graph}.plan"
        (root / path).write_bytes(data)
        plans.append(
            PlanInfo(graph=graph, onnx_sha256=onnx_digest, path=path, profiles=tuple(profiles), plugins=plugins)
        )
        sha256 = hashlib.sha256(data).hexdigest()
        files.append(PlanFile(kind="plan", path=path, size=len(data), sha256=sha256))
    fields: dict[str, Any] = {
        "format_version": ENGINE_FORMAT_VERSION, "bundle": digest, "target": Target.TRT, "version": VERSION,
        "platform": runtime.tensorrt.platform_name(), "compute_capabilities": (GPU.compute_capability,),
        "device": GPU.name, "driver": GPU.driver, "plans": tuple(plans), "artifacts": tuple(files),
    }  # fmt: skip
    data = manifest_bytes(EngineManifest(**(fields | other)))
    (root / "manifest.json").write_bytes(data)
    (root / "manifest.sha256").write_bytes(seal_bytes(data))
    return root
