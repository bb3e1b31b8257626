"""What holds of a graph whose numbers nobody compares: it is sound ONNX and takes and gives what its signature says."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from exporter.errors import VerifyError
from runtime.manifest import GraphInfo
from runtime.signature import TensorSpec

DTYPES = {"int64": "INT64", "float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def require_structure(root: Path, graph: GraphInfo) -> None:
    """Refuse a graph that onnx's checker does, or whose inputs and outputs are not the signature's.

    Names, order, dtypes and sizes; a size that is a symbol may be any but a number. Raises VerifyError.
    Where its weights lie is `check_external_data`'s.
    """
    path = root / graph.path
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        got = str(error).strip().splitlines()[0][:300]
        raise VerifyError("onnx refuses the graph", where=f"graph {graph.name}", got=got, code="E_GRAPH") from error
    loaded = ir.load(path).graph
    for side, specs, values in (
        ("inputs", graph.signature.inputs, loaded.inputs),
        ("outputs", graph.signature.outputs, loaded.outputs),
    ):
        found, wanted = [_described(value) for value in values], [_wanted(spec) for spec in specs]
        if found != wanted:
            place = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), -1)
            raise VerifyError(
                f"the graph's {side} are not those of its signature",
                where=f"graph {graph.name}",
                got=str(found[place]) if place >= 0 else f"{len(found)} {side}",
                need=str(wanted[place]) if place >= 0 else f"{len(wanted)} {side}",
                fix="nothing was published; please report this model as a bug",
            )


def _described(value: ir.Value) -> tuple[str | None, str, tuple[int | None, ...]]:
    sizes = () if value.shape is None else value.shape.dims
    dtype = "" if value.dtype is None else value.dtype.name
    return value.name, dtype, tuple(size if isinstance(size, int) else None for size in sizes)


def _wanted(spec: TensorSpec) -> tuple[str | None, str, tuple[int | None, ...]]:
    return spec.name, DTYPES[spec.dtype], tuple(size if isinstance(size, int) else None for size in spec.shape)
