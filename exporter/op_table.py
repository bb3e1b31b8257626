"""The operators that TensorRT 10.1's ONNX parser takes, read from the table in the package."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import onnx_ir as ir

TABLE = "tensorrt-10.1-operators.tsv"

# The table's words for types.
DTYPES = {
    "FP32": ir.DataType.FLOAT,
    "FP16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "FP8": ir.DataType.FLOAT8E4M3FN,
    "INT4": ir.DataType.INT4,
    "INT8": ir.DataType.INT8,
    "UINT8": ir.DataType.UINT8,
    "INT32": ir.DataType.INT32,
    "INT64": ir.DataType.INT64,
    "BOOL": ir.DataType.BOOL,
}
MISSPELT = {"INF64": "INT64"}  # as the source has it


@dataclass(frozen=True, slots=True)
class Row:
    """What the table says of one operator; `restrictions` are its sentences, word for word."""

    operator: str
    is_supported: bool
    types: frozenset[ir.DataType]
    restrictions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OperatorTable:
    """The rows by operator, all their types together (DOUBLE is not among them), and the opsets that they are about."""

    rows: Mapping[str, Row]
    types: frozenset[ir.DataType]
    opsets: range


@cache
def operator_table() -> OperatorTable:
    """The table of the package; its first line, a comment, names its source and the opsets."""
    text = files("exporter").joinpath("tables", TABLE).read_text(encoding="utf-8")
    source, *lines = text.splitlines()
    opsets = re.search(r"opset (\d+) to (\d+)", source)
    assert opsets is not None, f"{TABLE} does not name its opsets"
    rows = [_row(fields) for fields in csv.DictReader(lines, delimiter="\t", restval="")]
    types = frozenset[ir.DataType]().union(*(row.types for row in rows))
    return OperatorTable({row.operator: row for row in rows}, types, range(int(opsets[1]), int(opsets[2]) + 1))


def _row(fields: Mapping[str, str]) -> Row:
    types = frozenset(DTYPES[MISSPELT.get(word, word)] for word in fields["types"].split(",") if word)
    sentences = re.split(r"\.(?:\s+|$)", fields["restrictions"])
    return Row(fields["operator"], fields["supported"] == "Y", types, tuple(filter(None, sentences)))
