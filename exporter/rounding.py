"""The weight-rounding check of fp16 and bf16 builds: the published graph is the verified fp32 one, rounded once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.errors import VerifyError
from exporter.graphs import Exported


def require_rounded(proof: Exported, rounded: Exported) -> None:
    """Every stored tensor equals the fp32 twin's rounded to nearest, and the operators are the same but for Cast.

    Raises VerifyError naming the first tensor or operator that differs.
    """
    require_same_operators(proof, rounded)
    for name, value in rounded.model.graph.initializers.items():
        twin = proof.model.graph.initializers.get(name)
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        if twin is None or twin.const_value is None:
            raise _differs(rounded, f"weight {name}", "no such weight in the fp32 twin")
        got = value.const_value.numpy()
        if not np.array_equal(got, twin.const_value.numpy().astype(got.dtype)):
            raise _differs(rounded, f"weight {name}", "values that are not the fp32 weights rounded to nearest")


def require_same_operators(proof: Exported, rounded: Exported) -> None:
    """The two traces differ in casts only."""
    want, got = operators(proof.model), operators(rounded.model)
    if want != got:
        place = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
        raise _differs(rounded, f"operator {place}", " ".join(got[place : place + 1]) or "none")


def operators(model: ir.Model) -> list[str]:
    """Operator names, sorted, without Cast and its kin."""
    return sorted(node.op_type for node in model.graph if node.op_type not in ("Cast", "CastLike"))


def _differs(rounded: Exported, where: str, got: str) -> VerifyError:
    return VerifyError(
        "the rounded graph is not its verified fp32 twin",
        where=f"graph {rounded.info.name}, {where}",
        got=got,
        fix="nothing was published; please report this model as a bug",
    )
