"""Launching through the CUDA driver: the real binding's types, a driver that only listens."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import pytest

from plugins.cubins import installed_cubins
from plugins.driver import Kernels
from plugins.launches import gate_launches, low_rank_launches
from plugins.operators import GateRules

RULES = GateRules(softmax=True, temperature=0.5, top_k=2, topk_softmax=False)


class Names:
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class ListeningDriver:
    """Answers like a GPU of the given compute capability and keeps what it is asked."""

    CUdevice_attribute = Names

    def __init__(self, capability: str, fails: str = "") -> None:
        self.major, self.minor = map(int, capability.split("."))
        self.fails = fails
        self.context, self.context_id = 4096, 1
        self.loaded: list[bytes] = []
        self.launched: list[tuple[Any, ...]] = []

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.context

    def cuCtxGetId(self, context: int) -> tuple[int, int]:
        return 0, self.context_id

    def cuCtxGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, self.major if attribute == 75 else self.minor

    def cuModuleLoadData(self, data: bytes) -> tuple[int, int]:
        self.loaded.append(data)
        return 0, len(self.loaded)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, str]:
        return 0, name.decode()

    def cuLaunchKernel(self, *arguments: Any) -> tuple[int]:
        self.launched.append(arguments)
        return (700 if self.fails else 0,)


def test_the_gpus_own_cubin_is_loaded_once_a_context() -> None:
    cubins = installed_cubins()
    for capability in ("7.5", "8.7", "12.0"):
        driver = ListeningDriver(capability)
        kernels = Kernels(cubins, driver)
        [launch] = gate_launches((10, 5), "float16", RULES)
        for _ in range(3):
            kernels.launch(launch, {"logits": 4096, "scalings": 8192}, stream=9)
        assert driver.loaded == [cubins.find(launch, capability).data]
        driver.context_id = 2  # a new context may lie where the old one lay
        kernels.launch(launch, {"logits": 4096, "scalings": 8192}, stream=9)
        assert len(driver.loaded) == 2, "a function belongs to its context"


def test_arguments_are_passed_in_the_kernels_order_with_two_null_pointers() -> None:
    driver = ListeningDriver("8.6")
    kernels = Kernels(installed_cubins(), driver)
    [launch] = gate_launches((10, 5), "float32", RULES)
    kernels.launch(launch, {"logits": 4096, "scalings": 8192}, stream=9)
    [(function, *rest)] = driver.launched
    *grid_and_block, shared, stream, (values, types), extra = rest
    assert function == "gate_scalings"
    assert grid_and_block == [*launch.grid, 128, 1, 1]
    assert (stream, extra) == (9, 0)
    assert shared == installed_cubins().find(launch, "8.6").shared
    assert values == (4096, 8192, 10, 5, 0.5, 1, 2, 0, 0, 0)
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    assert types == (pointer, pointer, integer, integer, real, integer, integer, integer, pointer, pointer)


def test_the_real_binding_takes_what_we_pass() -> None:
    """Without a GPU it says no to the launch, but only after it has read the arguments."""
    from cuda.bindings import driver

    for launch in (*gate_launches((10, 5), "float32", RULES), *low_rank_launches((3, 64), 8, 32, "float32")):
        recording = ListeningDriver("8.6")
        names = dict.fromkeys(("logits", "scalings", "x", "a", "factors", "hidden", "base", "b", "y"), 4096)
        Kernels(installed_cubins(), recording).launch(launch, names, stream=0)
        [(_, *rest)] = recording.launched
        with suppress(RuntimeError):  # no driver library at all
            assert int(driver.cuLaunchKernel(driver.CUfunction(0), *rest)[0]), "a launch of nothing cannot succeed"


def test_errors_name_what_the_driver_said() -> None:
    kernels = Kernels(installed_cubins(), ListeningDriver("8.6", fails="yes"))
    with pytest.raises(RuntimeError, match="the CUDA driver refuses: 700"):
        kernels.launch(gate_launches((1, 2), "float32", RULES)[0], {"logits": 1, "scalings": 2}, stream=0)
    with pytest.raises(LookupError, match=r"for compute capability 6\.1; there are 7\.5, 8\.0"):
        Kernels(installed_cubins(), ListeningDriver("6.1")).launch(
            gate_launches((1, 2), "float32", RULES)[0], {"logits": 1, "scalings": 2}, stream=0
        )
