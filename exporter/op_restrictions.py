"""The restrictions of TensorRT's operator table, by its own sentences: the check of each, and what it leaves open."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from exporter.op_checks import (
    Check,
    Use,
    attribute_in,
    attributes_absent,
    branches_agree,
    carried_shapes_stay,
    constant_input,
    constant_zero_input,
    dilations_one,
    iota_axes,
    k_below,
    kernel_2d_or_3d,
    outputs_at_most,
    pads_symmetric,
    same_activations,
    scan_length_fixed,
    static_axis,
    static_dimensions,
    x_ranks,
)

RESIZE_TRANSFORMATIONS = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
NEAREST_MODES = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")

CHECKS: Mapping[str, Check] = {
    "2D or 3D Pooling only": kernel_2d_or_3d,
    "2D or 3D pooling only": kernel_2d_or_3d,
    "Antialiasing is not supported": attribute_in("antialias", 0, None),
    "Indices output tensor unsupported": outputs_at_most(1),
    "Input must be 4D input": x_ranks(4),
    "K input must be less than 3840": k_below(3840),
    "Only the first output Y is supported": outputs_at_most(1),
    "Output tensors of the two conditional branches must have the same rank and must have different names": (
        branches_agree
    ),
    "Scan output length cannot be dynamic": scan_length_fixed,
    "Supported aspect ratio policy: stretch": attribute_in("keep_aspect_ratio_policy", "stretch", None),
    "Supported nearest modes: floor, ceil, round_prefer_floor, round_prefer_ceil": attribute_in(
        "nearest_mode", *NEAREST_MODES, None, when=("mode", "nearest")
    ),
    "Supported resize modes: nearest, linear": attribute_in("mode", "nearest", "linear"),
    "Supported resize transformation modes: half_pixel, pytorch_half_pixel, tf_half_pixel_for_nn, asymmetric, "
    "and align_corners": attribute_in("coordinate_transformation_mode", *RESIZE_TRANSFORMATIONS, None),
    "The shape of Loop carried dependencies must be the same across all loop iterations": carried_shapes_stay,
    "When scales is a tensor input, axes must be an iota vector of length rank(input)": iota_axes,
    "axes must be a constant tensor": constant_input("axes"),
    "axes must be an initializer": constant_input("axes"),
    "axis dimension of input must be a build-time constant": static_axis,
    "axis must be an initializer": constant_input("axis"),
    "depth must be a build-time constant": constant_input("depth"),
    "dilations must be empty or all ones": dilations_one,
    "input must have 1D or 2D spatial dimensions": x_ranks(3, 4),
    "input must have static dimensions": static_dimensions,
    "input_forget attribute must be 0": attribute_in("input_forget", 0),
    "is_traning must be an initializer and evaluate to False": constant_zero_input("training_mode"),
    "layout attribute must be 0": attribute_in("layout", 0, None),
    "pads for the beginning and end along each spatial axis must be the same": pads_symmetric,
    "reduction is not supported": attribute_in("reduction", "none", None),
    "seed value is ignored by TensorRT": attributes_absent("seed"),
    "sorted must be 1": attribute_in("sorted", 1, None),
    "sparse_value, value_string, and value_strings attributes are unsupported": attributes_absent(
        "sparse_value", "value_string", "value_strings"
    ),
    "x_zero_point must be zero": constant_zero_input("x_zero_point"),
    "y_zero_point must be 0": constant_zero_input("y_zero_point"),
    **dict.fromkeys(
        (
            f"For bidirectional {kind}s, activation functions must be the same for both the forward and reverse pass"
            for kind in ("GRU", "LSTM", "RNN")
        ),
        same_activations,
    ),
}

# What of a sentence a graph may not show; its check passes there.
UNDECIDABLE: Mapping[str, str] = {
    "Input must be 4D input": "an input of unknown rank",
    "K input must be less than 3840": "a K that is computed or fed at run time",
    "Output tensors of the two conditional branches must have the same rank and must have different names": (
        "branches of unknown rank"
    ),
    "Scan output length cannot be dynamic": "a condition that ends a loop before its constant trip count",
    "The shape of Loop carried dependencies must be the same across all loop iterations": (
        "dimensions without a number, and shapes that inference leaves open"
    ),
    "When scales is a tensor input, axes must be an iota vector of length rank(input)": (
        "whether the axes are all of them, for an input of unknown rank"
    ),
    "axis dimension of input must be a build-time constant": "an input of unknown rank",
    "input must have 1D or 2D spatial dimensions": "an input of unknown rank",
    "input must have static dimensions": "an input of unknown rank",
}


def broken(use: Use, restrictions: Collection[str]) -> Iterator[str]:
    """`sentence: what breaks it` for each of the table's sentences that this node breaks."""
    for sentence in restrictions:
        problem = CHECKS[sentence](use)
        if problem:
            yield f"{sentence}: {problem}"
