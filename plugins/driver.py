"""Launch compiled kernels through the CUDA driver (cuda-bindings): no Triton, no torch, no CUDA runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

from plugins.cubins import Cubins
from plugins.launches import KERNELS, SCRATCH, WARPS, Launch

C_TYPES = {"i32": ctypes.c_int, "fp32": ctypes.c_float}  # a pointer is a c_void_p


class Kernels:
    """The kernels for the GPU of the current CUDA context, loaded when they are first launched."""

    def __init__(self, cubins: Cubins, driver: Any) -> None:
        self._cubins = cubins
        self._driver = driver
        self._architecture = ""
        self._functions: dict[object, tuple[Any, int]] = {}

    def launch(self, launch: Launch, pointers: Mapping[str, int], stream: int) -> None:
        """Enqueue on `stream`; RuntimeError with the driver's own name for what went wrong."""
        function, shared = self._function(launch)
        kinds = [kind for _, kind in KERNELS[launch.kernel].parameters]
        values = [pointers[value] if isinstance(value, str) else value for value in launch.arguments]
        types = [C_TYPES.get(kind, ctypes.c_void_p) for kind in kinds]
        arguments = ((*values, *[0] * SCRATCH), (*types, *[ctypes.c_void_p] * SCRATCH))
        block = (32 * WARPS, 1, 1)
        self._check(self._driver.cuLaunchKernel(function, *launch.grid, *block, shared, stream, arguments, 0))

    def _function(self, launch: Launch) -> tuple[Any, int]:
        """A function belongs to the context it was loaded in; a later one may have the same handle, but not its id."""
        context = int(self._check(self._driver.cuCtxGetId(self._check(self._driver.cuCtxGetCurrent()))))
        key = (context, launch.kernel, launch.dtype, launch.constants)
        if key not in self._functions:
            cubin = self._cubins.find(launch, self._architecture or self._capability())
            module = self._check(self._driver.cuModuleLoadData(cubin.data))
            function = self._check(self._driver.cuModuleGetFunction(module, launch.kernel.encode()))
            self._functions[key] = function, cubin.shared
        return self._functions[key]

    def _capability(self) -> str:
        device = self._check(self._driver.cuCtxGetDevice())
        names = self._driver.CUdevice_attribute
        parts = (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
        major, minor = (self._check(self._driver.cuDeviceGetAttribute(part, device)) for part in parts)
        self._architecture = f"{major}.{minor}"
        return self._architecture

    def _check(self, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if int(status):
            raise RuntimeError(f"the CUDA driver refuses: {getattr(status, 'name', status)}")
        return values[0] if values else None


def installed_kernels() -> Kernels:
    """The kernels of this package on the real driver."""
    from cuda.bindings import driver

    from plugins.cubins import installed_cubins

    return Kernels(installed_cubins(), driver)
