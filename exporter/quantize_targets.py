"""What quantised graphs each engine takes; without torch, for engines are built without it."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.errors import ExportError
from runtime.engines import Target
from runtime.errors import InputError, raise_all
from runtime.quantization import QuantizationInfo


def require_engine(info: QuantizationInfo | None, target: str) -> None:
    """Refuse for TensorRT what only ONNX Runtime reads."""
    if info is not None:
        raise_all(f"target {target}", list(target_problems(info, target)))


def target_problems(info: QuantizationInfo, target: str) -> Iterator[InputError]:
    """Everything that a TensorRT target does not read."""
    if target not in tuple(Target):
        return
    if not info.symmetric:
        what = "TensorRT takes no zero points but 0"
        fix = "leave out --quantize-asymmetric"
        yield ExportError(what, where="--quantize-asymmetric", got=f"--target {target}", fix=fix, code="E_OPERATOR")
    if info.embedding:
        what = "TensorRT looks up no rows of a quantised table"
        fix = "leave out --quantize-embedding"
        yield ExportError(what, where="--quantize-embedding", got=f"--target {target}", fix=fix, code="E_OPERATOR")
