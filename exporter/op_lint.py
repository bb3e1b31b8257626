"""Lint for old TensorRT: does a graph keep to what TensorRT 10.1's ONNX parser documents? Never run on TensorRT 10.3.

JetPack 6 ships 10.3; the table is 10.1's, so it is conservative (10.3 takes, for one, computed axes of Slice). Checked
are opset, operators, value types and restrictions, in subgraphs too; local functions are looked into where they are
called. No finding is no proof: unknown types and shapes pass, and so does what `op_restrictions.UNDECIDABLE` lists.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from exporter.errors import ExportError
from exporter.op_checks import Use
from exporter.op_restrictions import broken
from exporter.op_table import DTYPES, Row, operator_table

STATUS = "a lint by the operator table of TensorRT 10.1, never run on 10.3"
LISTED_GROUPS, LISTED_NODES = 12, 4
BLOCKS_OPSET = 21  # of DequantizeLinear with block_size, and so of quantised graphs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the table does not allow. Nodes of a local function are named DOMAIN::FUNCTION/NODE."""

    node: str
    operator: str
    reason: str


def lint(model: ir.Model) -> tuple[Finding, ...]:
    """All that the table does not allow, in graph order; the model stays as it is."""
    try:
        flat = inlined_and_typed(model)
    except (ValueError, ir.passes.PassError) as error:
        return (Finding(model.graph.name or "", "local functions", f"cannot be looked into: {error}"),)
    opset = flat.opset_imports.get("", 0)
    findings = [*_opset_findings(flat, opset)]
    for node in flat.graph.all_nodes():
        name = node.name or f"the node that makes {node.outputs[0].name}"
        findings += [Finding(name, node.op_type, reason) for reason in _reasons(node, opset)]
    return tuple(findings)


def require_lintable(model: ir.Model, graph_name: str) -> None:
    """Raise one ExportError that names every operator found and the first nodes of each."""
    findings = lint(model)
    if findings:
        raise ExportError(
            "the graph uses what TensorRT 10.3 may not take",
            where=f"graph {graph_name}",
            got=_shown(findings),
            need=f"what the table allows ({STATUS})",
            fix="build with --emit portable, or for a newer TensorRT",
            code="E_OPERATOR",
        )


def inlined_and_typed(model: ir.Model) -> ir.Model:
    """A copy with calls of local functions replaced by their bodies, and types and shapes inferred where missing."""
    copy = model.clone()
    for function in copy.functions.values():
        for node in function.all_nodes():
            node.name = f"{function.domain}::{function.name}/{node.name or node.op_type}"
    common.InlinePass()(copy)
    common.ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    untyped = [value for node in copy.graph.all_nodes() for value in node.outputs if value.dtype is None]
    if untyped:
        logger.info("%s of %s: type unknown, not checked", [value.name for value in untyped], copy.graph.name)
    return copy


def _opset_findings(model: ir.Model, opset: int) -> Iterator[Finding]:
    opsets = operator_table().opsets
    if opset not in opsets and not (opset == BLOCKS_OPSET and has_blocks(model)):
        yield Finding(model.graph.name or "", "opset", f"{opset}, the table is about {opsets[0]} to {opsets[-1]}")


def has_blocks(model: ir.Model) -> bool:
    """Whether weights are dequantised in blocks, for which ONNX needs an opset that the table is not about.

    TensorRT 10.1's table lists int4 weights, which ONNX has had only since then; all else is judged by the table.
    """
    return any(node.op_type == "DequantizeLinear" and "block_size" in node.attributes for node in model.graph)


def _reasons(node: ir.Node, opset: int) -> Iterator[str]:
    """Why the table does not allow this node."""
    row = operator_table().rows.get(node.op_type)
    if node.domain not in ("", "ai.onnx"):
        yield f"domain {node.domain} is not ONNX's, and the model has no such local function"
    elif row is None:
        yield "the table does not know it"
    elif not row.is_supported:
        yield "the table says that it is not supported"
    elif (schema := _schema(node.op_type, opset)) is None and onnx.defs.has(node.op_type):
        yield f"ONNX does not have it in opset {opset}"
    else:
        use = Use(node, schema)
        yield from _type_reasons(use, row)
        yield from broken(use, row.restrictions)


def _schema(operator: str, opset: int) -> onnx.defs.OpSchema | None:
    """The operator as this opset has it; None for one that is newer, or that ONNX has given up (ScaledTanh)."""
    try:
        return onnx.defs.get_schema(operator, opset)
    except onnx.defs.SchemaError:
        return None


def _type_reasons(use: Use, row: Row) -> Iterator[str]:
    inputs, outputs = (use.schema.inputs, use.schema.outputs) if use.schema else ((), ())
    for formals, values in ((inputs, use.node.inputs), (outputs, use.node.outputs)):
        for position, value in enumerate(values):
            if value is None or not value.dtype:  # left out, or of a type that is not known
                continue
            allowed = _allowed(row, formals[min(position, len(formals) - 1)] if formals else None)
            if value.dtype not in allowed:
                yield f"{value.name} is {_words([value.dtype])}, the table allows {_words(allowed)}"


def _allowed(row: Row, formal: onnx.defs.OpSchema.FormalParameter | None) -> frozenset[ir.DataType]:
    """The row's types, where ONNX allows this parameter one of them; for indices, masks and such all of the table's."""
    spelled = {f"tensor({dtype.name.lower()})" for dtype in row.types}
    return row.types if formal is None or spelled & set(formal.types) else operator_table().types


def _words(dtypes: Collection[ir.DataType]) -> str:
    """Types in the table's words and order, then others in ONNX's."""
    known = [word for word, dtype in DTYPES.items() if dtype in dtypes]
    return ", ".join([*known, *sorted(dtype.name for dtype in dtypes if dtype not in DTYPES.values())])


def _shown(findings: Sequence[Finding]) -> str:
    """Findings by operator and reason, the first nodes of each; beyond the first groups the operators alone."""
    ordered = sorted(findings, key=lambda finding: (finding.operator, finding.reason))
    groups = [list(group) for _, group in groupby(ordered, key=lambda finding: (finding.operator, finding.reason))]
    shown = [_group(group) for group in groups[:LISTED_GROUPS]]
    rest = sorted({group[0].operator for group in groups[LISTED_GROUPS:]})
    return "; ".join([*shown, *([f"and more of {', '.join(rest)}"] if rest else [])])


def _group(findings: Sequence[Finding]) -> str:
    names = [finding.node for finding in findings]
    more = f" and {len(names) - LISTED_NODES} more" if len(names) > LISTED_NODES else ""
    return f"{findings[0].operator} ({findings[0].reason}) at {', '.join(names[:LISTED_NODES])}{more}"
