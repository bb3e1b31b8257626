"""Weight-only quantisation of a bundle's graphs: what was quantised and how, and how ONNX Runtime is to run it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class WeightType(StrEnum):
    """What the weights of products are stored as."""

    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Of one weight."""
        return {WeightType.INT8: 8, WeightType.INT4: 4}[self]


class ActivationType(StrEnum):
    """What ONNX Runtime's CPU multiplies quantised weights with."""

    FLOAT = "float"  # activations as they are: weight-only
    INT8 = "int8"  # activations rounded in blocks, too: faster, and no longer weight-only


class QuantizeMethod(StrEnum):
    """How the rounded weights are found."""

    RTN = "rtn"  # each rounded to nearest
    GPTQ = "gptq"  # one after the other, the rest making up for the error (Frantar et al., 2022)


class QuantizationInfo(BaseModel):
    """Quantised weights: block-wise along the input dimension, one scale a block."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    weights: WeightType
    block: Annotated[int, Field(ge=16, le=256)] = 32  # inputs that share a scale; a power of two
    symmetric: bool = True  # all zero points are 0
    head: bool = False  # lm_head is quantised, too
    embedding: bool = False  # the token embedding is, as int8
    activations: ActivationType = ActivationType.FLOAT
    method: QuantizeMethod = QuantizeMethod.RTN
    modules: tuple[str, ...] = ()  # whose weights are quantised, in module-tree order


def session_entries(info: QuantizationInfo | None) -> Mapping[str, str]:
    """ONNX Runtime's session settings for such a graph; measured with 1.31.1 (docs/quantization.md).

    It makes one MatMulNBits of DequantizeLinear and MatMul while it loads; by default that rounds activations to int8.
    """
    if info is None:
        return {}
    if info.activations is ActivationType.INT8:
        return {"session.qdq_matmulnbits_accuracy_level": "4"}
    if info.weights is WeightType.INT4:
        return {"session.qdq_matmulnbits_accuracy_level": "1"}
    # No fast product of int8 weights with float activations: the weights become floats once, at load.
    return {"session.disable_quant_qdq": "1"}


def quantization_text(info: QuantizationInfo) -> str:
    """The settings, for people."""
    kind = "symmetric" if info.symmetric else "asymmetric"
    ends = [word for word, is_on in (("lm_head", info.head), ("the embedding as int8", info.embedding)) if is_on]
    also = f", {' and '.join(ends)} too" if ends else ""
    return (
        f"{info.weights}, blocks of {info.block}, {kind}, {info.method}, activations {info.activations}; "
        f"{len(info.modules)} modules{also}"
    )
