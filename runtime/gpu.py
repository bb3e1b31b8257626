"""What the NVIDIA driver says of this machine, asked through ctypes: engines' packages may crash without a driver."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from runtime.errors import MachineError

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU of this machine and the driver in front of it."""

    name: str
    compute_capability: str  # "8.7"
    driver: str  # the newest CUDA the driver speaks: "13.0"


def has_driver() -> bool:
    """Whether an NVIDIA driver answers."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return bool(driver.cuInit(0) == 0)


def this_gpu() -> Gpu:
    """Asked by cuDeviceGetName, cuDeviceGetAttribute, cuDriverGetVersion."""
    driver = ctypes.CDLL(DRIVER)
    device, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    numbers = [ctypes.c_int(), ctypes.c_int()]
    calls = [
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDriverGetVersion(ctypes.byref(version)),
        *(
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True)
        ),
    ]
    if any(calls):
        raise MachineError("the NVIDIA driver does not answer", got=f"CUDA error {max(calls)}", code="E_GPU")
    return Gpu(
        name.value.decode(errors="replace"),
        f"{numbers[0].value}.{numbers[1].value}",
        f"{version.value // 1000}.{version.value % 1000 // 10}",
    )
