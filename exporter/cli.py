"""The command line of the exporter: one module of `commands` a command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from exporter.commands import analyze, build, engine, inspect, learn_mix, record, verify
from runtime.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input, 3 the machine lacks something, 4 a defect, 130 Ctrl-C."""
    args = parser().parse_args(argv)
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.ERROR if args.quiet else logging.WARNING, format="%(message)s")
    return run_command(lambda: args.run(args), packages=".[export,cpu]", interrupted=args.interrupted)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="python -m exporter", description="Export X-LoRA models to ONNX bundles.")
    top.set_defaults(interrupted="interrupted")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (inspect, build, learn_mix, analyze, engine, verify, record):
        command.add_options(commands)
    return top
