"""`verify`: check a bundle, alone or against its sources."""

from __future__ import annotations

import argparse
from pathlib import Path

from exporter.commands.checks import check_line
from exporter.commands.options import Commands, add_quiet, add_sources, one_of, silence_transformers
from exporter.spec import BuildSpec
from runtime.errors import InputError
from runtime.manifest import VerifyLevel


def add_options(commands: Commands) -> None:
    """The command `verify`."""
    command = commands.add_parser("verify", help="check a bundle, alone or against its sources")
    add = command.add_argument
    add("bundle", type=Path, metavar="BUNDLE")
    add_sources(command)
    add("--verify", type=one_of(VerifyLevel), choices=["full", "quick"], help="extent of the numeric checks")
    add("--threads", type=int, metavar="N")
    add_quiet(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check a bundle and print every measure."""
    from exporter.verify_bundle import verify_bundle

    sources = None
    if args.adapters or args.base or args.gate:
        silence_transformers()
        adapters, extent = tuple(args.adapters), {"verify": args.verify, "threads": args.threads}
        sources = BuildSpec(adapters, args.base, args.gate, tokenizer=args.tokenizer, **extent)
    elif args.verify:
        raise InputError("--verify chooses the checks against the sources", got="no sources", fix="add --adapters")
    results = verify_bundle(args.bundle, sources, threads=args.threads)
    for result in results:
        print(f"graph {result.graph} against its {result.against}:")
        print("\n".join(check_line(check) for check in result.checks))
    return 0
