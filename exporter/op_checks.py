"""What can be asked of one node of a graph: one check for each kind of restriction in TensorRT's operator table.

A check answers what is wrong, or None. What the graph does not show passes: unknown shapes, values that are not stored
yet or known at run time only. A "build-time constant" is an initializer or a Constant here: folding is not followed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Use:
    """One node, its inputs, outputs and attributes by the names of the operator's schema (None: not known to ONNX)."""

    node: ir.Node
    schema: onnx.defs.OpSchema | None

    def input(self, name: str) -> ir.Value | None:
        """The value of this input; None if it is left out or no input of this opset's operator."""
        names = [formal.name for formal in self.schema.inputs] if self.schema else []
        position = names.index(name) if name in names else len(self.node.inputs)
        return self.node.inputs[position] if position < len(self.node.inputs) else None

    def attribute(self, name: str) -> Any:
        """The attribute's value, or its default, or None."""
        if name in self.node.attributes:
            return self.node.attributes[name].value
        formal = self.schema.attributes.get(name) if self.schema else None
        if formal is None or not formal.default_value.type:
            return None
        default = onnx.helper.get_attribute_value(formal.default_value)
        return default.decode() if isinstance(default, bytes) else default


Check = Callable[[Use], str | None]


def is_constant(value: ir.Value) -> bool:
    """Whether the parser sees weights rather than a tensor."""
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_identifier() == ("", "Constant", ""))


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant, where they are there."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None and is_constant(value) else None
    return None if tensor is None else tensor.numpy()


def shape_of(value: ir.Value | None) -> ir.Shape | None:
    return None if value is None else value.shape


def rank_of(value: ir.Value | None) -> int | None:
    shape = shape_of(value)
    return None if shape is None else len(shape)


def constant_input(name: str) -> Check:
    def check(use: Use) -> str | None:
        value = use.input(name)
        return (
            f"{name} is {value.name}, computed or fed at run time"
            if value is not None and not is_constant(value)
            else None
        )

    return check


def constant_zero_input(name: str) -> Check:
    def check(use: Use) -> str | None:
        array = array_of(use.input(name))
        return constant_input(name)(use) or (f"{name} has other values" if array is not None and array.any() else None)

    return check


def attribute_in(name: str, *allowed: str | int | None, when: tuple[str, str] | None = None) -> Check:
    """The attribute, or its default, is one of these; `when` (attribute, value): only then."""

    def check(use: Use) -> str | None:
        value = use.attribute(name)
        applies = when is None or use.attribute(when[0]) == when[1]
        return f"{name} is {value!r}" if applies and value not in allowed else None

    return check


def attributes_absent(*names: str) -> Check:
    def check(use: Use) -> str | None:
        given = [name for name in names if name in use.node.attributes]
        return f"{', '.join(given)} is given" if given else None

    return check


def outputs_at_most(count: int) -> Check:
    def check(use: Use) -> str | None:
        names = [output.name for output in use.node.outputs[count:] if output.name]
        return f"it makes {', '.join(names)} too" if names else None

    return check


def kernel_2d_or_3d(use: Use) -> str | None:
    kernel = use.attribute("kernel_shape")
    return f"kernel_shape {list(kernel)}" if kernel is not None and len(kernel) not in (2, 3) else None


def dilations_one(use: Use) -> str | None:
    dilations = use.attribute("dilations") or ()
    return f"dilations {list(dilations)}" if set(dilations) - {1} else None


def x_ranks(*allowed: int) -> Check:
    """The first input, X, has one of these ranks."""

    def check(use: Use) -> str | None:
        rank = rank_of(use.input("X"))
        return f"X has {rank} dimensions" if rank is not None and rank not in allowed else None

    return check


def pads_symmetric(use: Use) -> str | None:
    pads = list(use.attribute("pads") or ())
    half = len(pads) // 2
    return f"pads {pads}" if pads[:half] != pads[half:] else None


def static_dimensions(use: Use) -> str | None:
    shape = shape_of(use.input("input"))
    return f"shape {shape}" if shape is not None and not shape.is_static() else None


def static_axis(use: Use) -> str | None:
    shape, axis = shape_of(use.input("input")), use.attribute("axis")
    if shape is None or not -len(shape) <= axis < len(shape) or isinstance(shape[axis], int):
        return None
    return f"dimension {axis} of shape {shape}"


def same_activations(use: Use) -> str | None:
    """Their parameters belong to them: other alphas or betas make another function."""
    names = ("activations", "activation_alpha", "activation_beta")
    for name in names if use.attribute("direction") == "bidirectional" else ():
        given = list(use.attribute(name) or ())
        half = len(given) // 2
        if given[:half] != given[half:]:
            return f"{name} {given}"
    return None


def branches_agree(use: Use) -> str | None:
    then, other = (use.attribute(name).outputs for name in ("then_branch", "else_branch"))
    shared = sorted({value.name for value in then} & {value.name for value in other})
    if shared:
        return f"both branches name {', '.join(shared)}"
    for one, two in zip(then, other, strict=False):
        if None not in (ranks := (rank_of(one), rank_of(two))) and len(set(ranks)) > 1:
            return f"{one.name} has {ranks[0]} dimensions, {two.name} has {ranks[1]}"
    return None


def scan_length_fixed(use: Use) -> str | None:
    body, trips = use.attribute("body"), use.input("M")
    scans = len(use.node.outputs) - (len(body.inputs) - 2)
    if scans <= 0 or (trips is not None and is_constant(trips)):
        return None
    return "it has no trip count" if trips is None else f"the trip count {trips.name} is known at run time only"


def carried_shapes_stay(use: Use) -> str | None:
    body = use.attribute("body")
    for start, before, after in zip(use.node.inputs[2:], body.inputs[2:], body.outputs[1:], strict=False):
        for one in (start, before):
            if one is not None and are_different(one.shape, after.shape):
                return f"{one.name} {one.shape} becomes {after.name} {after.shape}"
    return None


def are_different(one: ir.Shape | None, two: ir.Shape | None) -> bool:
    """Whether two shapes are known to differ: dimensions without a number may be equal."""
    if one is None or two is None:
        return False
    pairs = zip(one, two, strict=False)
    return len(one) != len(two) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def iota_axes(use: Use) -> str | None:
    scales, axes, rank = use.input("scales"), use.attribute("axes"), rank_of(use.input("X"))
    if axes is None or scales is None or is_constant(scales):
        return None
    iota = list(range(len(axes) if rank is None else rank))
    return None if list(axes) == iota else f"scales is {scales.name}, axes {list(axes)}"


def k_below(limit: int) -> Check:
    def check(use: Use) -> str | None:
        array = array_of(use.input("K"))
        k = use.attribute("k") if array is None else int(array.max())
        return f"K is {k}" if k is not None and k >= limit else None

    return check
