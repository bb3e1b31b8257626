"""The options of `build` that quantise weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from exporter.commands.options import one_of
from exporter.errors import ExportError
from runtime.quantization import ActivationType, QuantizationInfo, QuantizeMethod, WeightType

BLOCKS = (16, 32, 64, 128, 256)


def add_quantize_options(command: argparse.ArgumentParser) -> None:
    """--quantize and what belongs to it."""
    add = command.add_argument_group("weight-only quantisation of the base (docs/quantization.md)").add_argument
    add("--quantize", type=one_of(WeightType), choices=list(WeightType), help="weights of products in blocks")
    add("--quantize-block", type=int, choices=BLOCKS, metavar="N", help="inputs that share a scale (default 32)")
    add("--quantize-asymmetric", action="store_true", help="zero points, too: ONNX Runtime only")
    add("--quantize-head", action="store_true", help="lm_head, too")
    add("--quantize-embedding", action="store_true", help="the token embedding, too, as int8: ONNX Runtime only")
    add(
        "--quantize-activations",
        type=one_of(ActivationType),
        choices=list(ActivationType),
        help="what ONNX Runtime's CPU multiplies them with (default float; int8 is faster and less exact)",
    )
    add(
        "--quantize-method",
        type=one_of(QuantizeMethod),
        choices=list(QuantizeMethod),
        help="round to nearest (default), or GPTQ, which wants texts",
    )
    add(
        "--quantize-texts",
        type=Path,
        metavar="FILE",
        help="JSON lines that GPTQ calibrates on, as learn-mix reads them",
    )
    add("--accept-loss", action="store_true", help="publish though it costs more than its limits")


def quantize_info(args: argparse.Namespace) -> QuantizationInfo | None:
    """The settings; refused where they have nothing to set."""
    given = {
        "block": args.quantize_block,
        "symmetric": False if args.quantize_asymmetric else None,
        "head": args.quantize_head or None,
        "embedding": args.quantize_embedding or None,
        "activations": args.quantize_activations,
        "method": args.quantize_method,
        "texts": args.quantize_texts,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if args.quantize is not None:
        chosen.pop("texts", None)
        return QuantizationInfo(weights=args.quantize, **chosen)
    flags = {"symmetric": "--quantize-asymmetric"}
    for name in [*(flags.get(name, f"--quantize-{name}") for name in chosen), *["--accept-loss"] * args.accept_loss]:
        raise ExportError(
            "is a setting of quantisation", where=name, got="no --quantize", fix="--quantize int8 or int4"
        )
    return None
