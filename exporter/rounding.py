"""The weight-rounding check of fp16 and bf16 builds: the published graph is the verified fp32 one, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from exporter.errors import ExportError, VerifyError
from exporter.graphs import Exported
from runtime.adapter_folder.half_range import MAX_HALF
from runtime.errors import InputError, raise_all


def round_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Round what a checkpoint stores; what the model computes for itself (rotary frequencies) stays fp32.

    So does transformers' loader. Frequencies in bf16 turn a token at position 1000 by a radian too much.
    """
    stored = model.state_dict().keys()
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    model.to(dtype)
    for name, buffer in computed.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, buffer)


def require_half_range(model: nn.Module) -> None:
    """Refuse to round to float16 what does not fit into it; all weights at once, before minutes of tracing."""
    largest = {name: float(weight.detach().abs().max()) for name, weight in model.named_parameters() if weight.numel()}
    problems: list[InputError] = [
        ExportError(
            f"weight {name} leaves the range of float16",
            got=f"values up to {value:.3g}",
            need=f"at most {MAX_HALF:.0f}",
            fix="build with --dtype bfloat16 or float32",
            code="E_VALUE",
        )
        for name, value in largest.items()
        if value > MAX_HALF
    ]
    raise_all("--dtype float16", problems)


def require_rounded(proof: Exported, rounded: Exported) -> None:
    """Every tensor equals the fp32 twin's rounded to nearest, and the operators are the same but for Cast.

    Raises VerifyError naming the first tensor or operator that differs, ExportError for weights beyond the dtype.
    """
    require_same_operators(proof, rounded)
    require_rounded_constants(proof, rounded)
    for name, value in rounded.model.graph.initializers.items():
        twin = proof.model.graph.initializers.get(name)
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        if twin is None or twin.const_value is None:
            raise _differs(rounded, f"weight {name}", "no such weight in the fp32 twin")
        got = value.const_value.numpy()
        with np.errstate(over="ignore"):
            wanted = twin.const_value.numpy().astype(got.dtype)
        if not np.array_equal(got, wanted):
            raise _differs(rounded, f"weight {name}", "values that are not the fp32 weights rounded to nearest")
        if not np.isfinite(got.astype(np.float32)).all():
            raise ExportError(
                f"weight {name} leaves the range of {got.dtype}",
                where=f"graph {rounded.info.name}",
                fix="build with --dtype bfloat16 or float32",
                code="E_VALUE",
            )


def require_rounded_constants(proof: Exported, rounded: Exported) -> None:
    """Every float constant inside the graph (scales, rotary frequencies) is one of the twin's, rounded once at most."""
    wanted = list(constants(proof.model).values())
    for name, got in constants(rounded.model).items():
        with np.errstate(over="ignore"):
            is_known = any(np.array_equal(got, want.astype(got.dtype)) for want in wanted if got.shape == want.shape)
        if not is_known:
            raise _differs(rounded, f"constant {name}", "values that no constant of the fp32 twin rounds to")


def constants(model: ir.Model) -> dict[str, np.ndarray[Any, Any]]:
    """The float tensors that lie inside the graph, by name."""
    inside = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {
        name: tensor.numpy()
        for name, tensor in inside.items()
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.dtype.is_floating_point()
    }


def require_same_operators(proof: Exported, rounded: Exported) -> None:
    """The two traces differ in casts only."""
    want, got = operators(proof.model), operators(rounded.model)
    if want != got:
        place = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
        raise _differs(rounded, f"operator {place}", " ".join(got[place : place + 1]) or "none")


def operators(model: ir.Model) -> list[str]:
    """What the nodes compute, sorted, without Cast and its kin."""
    return sorted(_meaning(node) for node in model.graph if node.op_type not in ("Cast", "CastLike"))


def _meaning(node: ir.Node) -> str:
    """An operator's name; a Clip with one limit is the Min or Max of two: torch writes clamp by dtype as either."""
    if node.op_type == "Clip":
        low, high = (*node.inputs, None, None)[1:3]
        return {(True, False): "Max", (False, True): "Min"}.get((low is not None, high is not None), "Clip")
    return node.op_type


def _differs(rounded: Exported, where: str, got: str) -> VerifyError:
    return VerifyError(
        "the rounded graph is not its verified fp32 twin",
        where=f"graph {rounded.info.name}, {where}",
        got=got,
        fix="nothing was published; please report this model as a bug",
    )
