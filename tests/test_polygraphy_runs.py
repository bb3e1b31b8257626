"""What tests/gpu asks of Polygraphy's TensorRT runner, as far as it can be tried without a GPU."""

from __future__ import annotations

import ctypes

import polygraphy.config
import polygraphy.cuda.cuda
import pytest

from plugins.operators import DOMAIN, OPERATORS, VERSION
from plugins.tensorrt_plugins import unregister
from runtime.engines import Target
from tests.polygraphy_runs import trt_runner, why_no_trt_runner


def loading(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """A loader that finds the CUDA runtime, or raises; Polygraphy has not asked before."""

    def load(name: str) -> object:
        if error is not None:
            raise error
        return object()

    monkeypatch.setattr(polygraphy.cuda.cuda, "G_CUDA", None)
    monkeypatch.setattr(ctypes, "CDLL", load)


def test_without_the_cuda_runtime_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    loading(monkeypatch, OSError("libcudart.so: cannot open shared object file"))
    assert why_no_trt_runner() == ("Polygraphy finds no CUDA runtime (libcudart.so: cannot open shared object file)")


def test_nothing_else_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    loading(monkeypatch, None)
    assert why_no_trt_runner() is None
    loading(monkeypatch, RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        why_no_trt_runner()


@pytest.mark.parametrize("plugins", [(), OPERATORS[:1], OPERATORS])
def test_a_runner_knows_the_plugins_of_its_plan(plugins: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """No others: TensorRT prefers a plugin to an operator's own function."""
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(polygraphy.config, "USE_TENSORRT_RTX", polygraphy.config.USE_TENSORRT_RTX)
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")
    unregister(trt)
    try:
        trt_runner(b"", Target.TRT_RTX, 0, plugins)
        registry = trt.get_plugin_registry()
        known = [name for name in OPERATORS if registry.get_creator(name, VERSION, DOMAIN) is not None]
        assert known == list(plugins)
    finally:
        unregister(trt)
