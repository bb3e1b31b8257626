"""Export X-LoRA models: `from exporter import build, BuildSpec`; torch and transformers load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.build_bundle import build as build
    from exporter.errors import ExportError as ExportError
    from exporter.errors import VerifyError as VerifyError
    from exporter.spec import AdapterSource as AdapterSource
    from exporter.spec import BuildSpec as BuildSpec
    from exporter.verify_bundle import verify_bundle as verify_bundle
    from exporter.watch import StageClock as StageClock

_HOMES = {
    "build": "exporter.build_bundle",
    "verify_bundle": "exporter.verify_bundle",
    "ExportError": "exporter.errors",
    "VerifyError": "exporter.errors",
    "AdapterSource": "exporter.spec",
    "BuildSpec": "exporter.spec",
    "StageClock": "exporter.watch",
}


def __dir__() -> list[str]:
    return sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
