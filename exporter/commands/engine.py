"""`engine`: build a bundle's TensorRT engines, on the device or (trt-rtx) anywhere."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from exporter.commands.engine_options import add_engine_options, build_engines_beside, engine_spec
from exporter.commands.options import Commands, add_quiet, one_of
from exporter.spec import OpChoice
from runtime.engines import Target


def add_options(commands: Commands) -> None:
    """The command `engine`."""
    command = commands.add_parser(
        "engine", help="build a bundle's TensorRT engines, on the device or (trt-rtx) anywhere"
    )
    add = command.add_argument
    add("bundle", type=Path, metavar="BUNDLE")
    add("--target", action="append", type=one_of(Target), choices=list(Target), required=True)
    add("--graph", dest="graphs", action="append", default=[], metavar="NAME", help="default: all")
    add("--overwrite", action="store_true", help="build again what is there")
    for flag in ("--gate-op", "--site-op"):
        add(flag, type=one_of(OpChoice), choices=list(OpChoice), help="default: as the graph has it")
    add_engine_options(command)
    add_quiet(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build engines beside a bundle."""
    from exporter.engines.build import chosen_graphs
    from exporter.engines.link import is_linked, run_linked
    from exporter.engines.spec import plugins_of
    from exporter.engines.tensorrt import load_builder
    from runtime.bundle import open_bundle

    bundle = open_bundle(args.bundle)
    asked = {
        "graphs": tuple(args.graphs),
        "overwrite": args.overwrite,
        "gate_op": args.gate_op,
        "site_op": args.site_op,
    }
    specs = [dataclasses.replace(engine_spec(args, target), **asked) for target in dict.fromkeys(args.target)]
    for spec in specs:
        load_builder(spec.target)
        plugins = [name for graph in chosen_graphs(bundle, spec) for name in plugins_of(graph, spec)]
        if plugins and not is_linked(spec.target):
            return run_linked(args.arguments)
    for spec in specs:
        build_engines_beside(bundle, spec, quiet=args.quiet)
    return 0
