"""The tensors of a bundle's weight store, by name and the right way round."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from exporter.store import TRANSPOSED
from runtime.bundle import Bundle

Floats = NDArray[np.float32]


class StoredWeights:
    """Reads one tensor at a time; NAME is found as NAME or as NAME.T."""

    def __init__(self, bundle: Bundle) -> None:
        # The framework is torch because numpy has no bfloat16.
        self._files: list[Any] = [safe_open(bundle.file(file), framework="pt") for file in bundle.artifacts("weights")]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - a handle, no dict

    @property
    def names(self) -> list[str]:
        """As they are stored."""
        return list(self._file_of)

    def stored_name(self, name: str) -> str | None:
        """NAME or NAME.T, whichever is there."""
        return next((way for way in (name, f"{name}{TRANSPOSED}") if way in self._file_of), None)

    def as_stored(self, name: str) -> Floats:
        """In float32, as it lies in the store."""
        values: Floats = self._file_of[name].get_tensor(name).float().numpy()
        return values

    def read(self, name: str) -> Floats:
        """In float32; a transposed one is turned back."""
        stored = self.stored_name(name)
        if stored is None:
            raise KeyError(name)
        values = self.as_stored(stored)
        return values if stored == name else values.T

    def integers(self, name: str) -> NDArray[np.int64]:
        """An int64 tensor."""
        values: NDArray[np.int64] = self._file_of[name].get_tensor(name).numpy()
        return values
