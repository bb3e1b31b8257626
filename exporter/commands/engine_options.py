"""What `build` and `engine` ask for TensorRT engines, and how both build them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.engines import Target, is_capability

if TYPE_CHECKING:
    from exporter.engines.spec import EngineSpec
    from runtime.bundle import Bundle


def add_engine_options(command: argparse.ArgumentParser) -> None:
    """What an engine is to hold, and where timings of its layers are kept."""
    add = command.add_argument_group("TensorRT engines").add_argument
    add(
        "--compute-capability",
        nargs="+",
        default=[],
        type=capabilities,
        metavar="8.6",
        help="GPUs of a trt-rtx engine, such as 8.6 8.9 or 8.6,8.9; default 8.0 and up",
    )
    add("--max-batch", type=int, default=4, metavar="N", help="requests in one step (default 4)")
    add("--max-tokens", type=int, default=512, metavar="N", help="prompt tokens in one step (default 512)")
    add("--max-context", type=int, metavar="N", help="tokens a request may have; default the model's, at most 4096")
    add("--workspace", type=int, metavar="MIB", help="memory that a layer may use; default TensorRT's")
    timings = _cache_folder() / "trt-timings.bin"
    add("--timing-cache", type=Path, default=timings, metavar="FILE", help=f"of trt builds (default {timings})")


def capabilities(text: str) -> tuple[str, ...]:
    """An argparse type: one or several, with commas or spaces between."""
    found = tuple(text.replace(",", " ").split())
    if not found or not all(is_capability(each) for each in found):
        raise argparse.ArgumentTypeError(f"{text!r}: need compute capabilities such as 8.6 or 8.6,8.9")
    return found


def _cache_folder() -> Path:
    """Where this user's programs keep what they can make again (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xlora-export"


def engine_spec(args: argparse.Namespace, target: Target) -> EngineSpec:
    """What the options ask of one target\'s engines."""
    from exporter.engines.spec import EngineSpec

    return EngineSpec(
        target=target,
        compute_capabilities=tuple(each for word in args.compute_capability for each in word),
        max_batch=args.max_batch,
        max_tokens=args.max_tokens,
        max_context=args.max_context,
        workspace_bytes=None if args.workspace is None else args.workspace << 20,
        timing_cache=args.timing_cache,
    )


def build_engines_beside(bundle: Bundle, spec: EngineSpec, *, quiet: bool) -> None:
    """Build the engines of a bundle, and print what they cost."""
    from exporter.engines import build_engines
    from exporter.progress import shown_stages, size_text

    with shown_stages(quiet=quiet) as clock:
        engines = build_engines(bundle, spec, clock)
    if not quiet and clock.memory is not None:
        for file in engines.manifest.artifacts:
            print(f"{file.path}  {size_text(file.size)}  {clock.seconds[f'engine {Path(file.path).stem}']:.1f} s")
        print(f"peak memory {size_text(clock.memory.anonymous)} anonymous")
    print(engines.root)
