"""The contract of the two operators, which every other file of this room implements. See docs/plugins.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

DOMAIN = "xlora"  # of the ONNX nodes and functions, and the namespace of the TensorRT plugins
VERSION = "1"  # TensorRT's plugin version

GATE_SCALINGS = "GateScalings"  # logits [..., E] -> scalings [..., E], row by row
GATED_LOW_RANK = "GatedLowRank"  # base [..., out], x [..., in], a [R, in], b [R, out], factors [..., R] -> y [..., out]

OPERATORS = (GATE_SCALINGS, GATED_LOW_RANK)

DTYPES = ("float32", "float16", "bfloat16")
MAX_EXPERTS = 64


@dataclass(frozen=True, slots=True)
class GateRules:
    """What turns the classifier's logits into scalings (PEFT XLoraClassifier and XLoraLayer), the attributes of a node.

    In this order: softmax of logits / temperature; the top_k largest stay, equal ones by lower expert, others become 0;
    softmax over what is not 0. A row without any such entry stays 0.
    """

    softmax: bool
    temperature: float
    top_k: int  # 0: all stay
    topk_softmax: bool

    def attributes(self) -> dict[str, int | float]:
        """As ONNX attributes."""
        return {
            "softmax": int(self.softmax),
            "temperature": self.temperature,
            "top_k": self.top_k,
            "topk_softmax": int(self.topk_softmax),
        }

    @classmethod
    def of(cls, attributes: Mapping[str, int | float]) -> Self:
        """Read back from the attributes of a node."""
        return cls(
            bool(attributes["softmax"]),
            float(attributes["temperature"]),
            int(attributes["top_k"]),
            bool(attributes["topk_softmax"]),
        )
