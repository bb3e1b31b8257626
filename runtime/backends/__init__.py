"""Backends by name: one file, one session class each; the engine's package is imported only when it is opened."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

from runtime.engines import Target
from runtime.errors import InputError
from runtime.session import SessionSettings, SlotSession
from runtime.signature import Signature

BACKENDS = {  # name -> "module:class", opened as class(graph, signature, settings)
    "ort": "runtime.backends.ort:OrtSession",
    "null": "runtime.backends.null:NullSession",
}


def open_session(backend: str, graph: Path, signature: Signature, settings: SessionSettings) -> SlotSession:
    """Open a graph file on the named backend; the TensorRT ones (`Target`) take an engine instead."""
    if backend not in BACKENDS:
        raise InputError("no such backend", got=repr(backend), need=" or ".join(sorted([*BACKENDS, *Target])))
    module, name = BACKENDS[backend].split(":")
    return cast(SlotSession, getattr(import_module(module), name)(graph, signature, settings))
