"""Safetensors files as torch reads them; header and bytes are checked by `runtime.adapter_folder`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.adapter_folder.files import open_regular
from runtime.adapter_folder.safetensors_file import SafetensorsFile

FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class WeightsFile(SafetensorsFile):
    """An open safetensors file whose float tensors are read into torch, in the file's dtype."""

    def read(self, key: str) -> torch.Tensor:
        """A copy of one float tensor."""
        return self.read_rows(key, 0, None)

    def read_rows(self, key: str, first: int, count: int | None) -> torch.Tensor:
        """Rows `first` .. `first + count` of a float tensor along its first dimension."""
        data, shape = self.read_bytes(key, first, count)
        dtype = FLOAT_DTYPES[self.entries[key].dtype]
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Open and check a safetensors file; links are followed once, here."""
    with open_regular(path) as file:
        yield WeightsFile(path, file)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; allocates nothing of the tensor's size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN propagates to both
    return bool(torch.isfinite(low) and torch.isfinite(high))
