"""`analyze`: what the gate, the experts and the base's weights do on given texts, as one page and as numbers."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.commands.options import Commands, add_quiet, count, natural
from runtime.errors import MachineError

if TYPE_CHECKING:
    from exporter.analysis.report import Report


def add_options(commands: Commands) -> None:
    """The command `analyze`."""
    command = commands.add_parser("analyze", help="decide with data: static or dynamic, what experts do, what it costs")
    add = command.add_argument
    add("bundle", type=Path, metavar="BUNDLE")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='lines of {"prompt": ..., "completion": ...} or {"text": ...}',
    )
    add("--out", type=Path, required=True, metavar="DIR", help="gets report.html, report.json and mix.json")
    add("--overwrite", action="store_true", help="replace a report that is there")
    add("--context", type=natural, metavar="N", help="cached tokens of the cost table (default 1024, or what fits)")
    add("--no-compression", action="store_true", help="leave out the study of smaller base weights, the longest part")
    add("--threads", type=count, metavar="N", help="of ONNX Runtime")
    add_quiet(command)
    command.set_defaults(run=run, interrupted="interrupted; nothing was written")


def run(args: argparse.Namespace) -> int:
    """Analyse, publish the report's folder, print its summary."""
    from exporter.progress import shown_stages

    with shown_stages(quiet=args.quiet) as clock:
        _require_packages()
        from exporter.analysis.analyze import AnalyzeSpec, analyze
        from exporter.analysis.page import page
        from exporter.analysis.publish_report import MIX, check_outside, check_target, publish_report

        check_outside(args.out, args.bundle)
        check_target(args.out, overwrite=args.overwrite)
        spec = AnalyzeSpec(
            args.bundle, args.data, str(args.out / MIX), args.context, args.threads, not args.no_compression
        )
        report, mix = analyze(spec, clock)
        with clock.stage("page"):
            publish_report(args.out, report, page(report), mix, overwrite=args.overwrite)
    if not args.quiet:
        _print_summary(report)
    print(args.out)
    return 0


def _require_packages() -> None:
    """Minutes before they are needed."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        fix = "pip install '.[export,cpu,analyze]' in the source folder"
        raise MachineError(f"not installed: {', '.join(missing)}", fix=fix, code="E_PACKAGE")


def _print_summary(report: Report) -> None:
    """The variants' scores and the recommendation."""
    width = max(len(score.name) for score in report.mixes.scores)
    print(f"{'':<{width}}  {'perplexity':>10}  {'KL':>9}  same top token")
    for score in report.mixes.scores:
        print(f"{score.name:<{width}}  {score.perplexity:>10.4g}  {score.divergence:>9.3g}  {score.agreement:.1%}")
    print(f"recommended: {report.mixes.recommendation.choice}. {report.mixes.recommendation.reason}")
    for command in report.mixes.recommendation.commands:
        print(f"  {command}")
