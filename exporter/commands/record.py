"""`record`: write what PyTorch answers, for `python -m runtime compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from exporter.commands.options import Commands, add_quiet, add_sources, silence_transformers
from exporter.spec import BuildSpec
from runtime.errors import InputError


def add_options(commands: Commands) -> None:
    """The command `record`."""
    command = commands.add_parser("record", help="write what PyTorch answers, for `python -m runtime compare`")
    add = command.add_argument
    add("bundle", type=Path, metavar="BUNDLE")
    add_sources(command)
    add("--graph", metavar="NAME", help="a graph's name or mode (default: the dynamic one)")
    add("--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="record these texts")
    add("--out", type=Path, required=True, metavar="FILE.npz")
    add_quiet(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Record one graph's reference."""
    from exporter.progress import shown_stages, size_text
    from runtime.bundle import open_bundle
    from runtime.model import pick_graph
    from runtime.recording import save_recording

    if not args.out.parent.is_dir():  # minutes before it is needed
        raise InputError("no such folder", where="--out", got=str(args.out.parent))
    bundle = open_bundle(args.bundle)
    sources = BuildSpec(
        tuple(args.adapters), args.base, args.gate, tokenizer=args.tokenizer, prompts=tuple(args.prompts)
    )
    graph = pick_graph(bundle, args.graph)
    with shown_stages(quiet=args.quiet) as clock:
        from exporter.record import record as record_graph

        silence_transformers()
        recording = record_graph(bundle, sources, graph, clock)
        save_recording(recording, args.out)
    if not args.quiet:
        cases = ", ".join(f"{case.name} ({len(case.texts)} texts)" for case in recording.header.cases)
        print(f"graph {graph.name}: {cases}; {recording.positions} positions, {size_text(args.out.stat().st_size)}")
    print(args.out)
    return 0
