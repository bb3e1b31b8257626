"""Bundle -> TensorRT engines, on the device or (TensorRT for RTX) anywhere; needs neither torch nor transformers."""

from exporter.engines.build import build_engines
from exporter.engines.spec import EngineSpec

__all__ = ["EngineSpec", "build_engines"]
