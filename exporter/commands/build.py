"""`build`: make a verified bundle from a base, experts and a gate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.commands.checks import check_line, loss_line
from exporter.commands.engine_options import add_engine_options, build_engines_beside, engine_spec
from exporter.commands.options import (
    Commands,
    add_quiet,
    add_sources,
    count,
    natural,
    one_of,
    positive,
    share,
    silence_transformers,
)
from exporter.commands.quantize_options import add_quantize_options, quantize_info
from exporter.errors import ExportError
from exporter.spec import AdaptersAs, BuildSpec, CacheChoice, DType, HotSpec, OpChoice, RouterSpec, ScalingsChoice
from runtime.engines import Target
from runtime.errors import InputError
from runtime.manifest import (
    BUILD_LOG_NAME,
    Emit,
    MergeInfo,
    MergeMethod,
    Mode,
    Pooling,
    Task,
    TopkSoftmax,
    VerifyLevel,
)
from runtime.quantization import quantization_text
from runtime.routers import RouterKind

if TYPE_CHECKING:
    from exporter.watch import StageClock
    from runtime.bundle import Bundle


def add_options(commands: Commands) -> None:
    """The command `build`."""
    command = commands.add_parser("build", help="make a verified bundle from a base, experts and a gate")
    add = command.add_argument
    add_sources(command)
    add("--mode", nargs="+", type=one_of(Mode), choices=list(Mode), default=[Mode.DYNAMIC], help="one or both")
    add("--mix", metavar="math=0.7,code=0.3|FILE.json", help="the mix of a static graph; 'base' for no expert")
    _add_merge(command)
    _add_router(command)
    add(
        "--variants",
        nargs="+",
        default=[],
        metavar="NAME:[static:]MIX|FILE",
        help="named mixes: rows of the dynamic graph, or static graphs of their own; MIX as for --mix; FILE (JSON or "
        "YAML) names many",
    )
    add(
        "--scalings",
        type=one_of(ScalingsChoice),
        choices=list(ScalingsChoice),
        help="rows of scalings a token; default sites where the gate or a named mix has weights by site",
    )
    _add_hot(command)
    add_quantize_options(command)
    add("--out", type=Path, metavar="DIR", help="default ./NAME-MODE")
    add("--overwrite", action="store_true", help="replace the bundle that is there")
    add("--emit", type=one_of(Emit), choices=list(Emit), default=Emit.PORTABLE, help="opset 18 or opset 24 operators")
    add("--dtype", type=one_of(DType), choices=list(DType), default=DType.FLOAT32, help="of weights and K/V")
    add(
        "--no-onnxruntime-form",
        action="store_true",
        help="leave out the graphs in ONNX Runtime's own operators, which its CPU provider runs faster",
    )
    add("--cache", type=one_of(CacheChoice), choices=list(CacheChoice), default=CacheChoice.KV)
    add(
        "--topk-softmax",
        type=one_of(TopkSoftmax),
        choices=list(TopkSoftmax),
        help="the rule the gate was trained with",
    )
    add(
        "--verify",
        type=one_of(VerifyLevel),
        choices=list(VerifyLevel),
        help="default full up to 300 M parameters, then quick",
    )
    add("--task", type=one_of(Task), choices=list(Task), help="default: that of the base's architecture")
    add("--pooling", type=one_of(Pooling), choices=list(Pooling), help="of embeddings (default: the folder's, or mean)")
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="embeddings to length 1 (default: the folder's)",
    )
    add("--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="verify with these texts")
    add("--threads", type=int, metavar="N", help="of ONNX Runtime during verification")
    plugin = "plain operators, or one plugin node with a fallback"
    add("--gate-op", type=one_of(OpChoice), choices=list(OpChoice), default=OpChoice.OPS, help=f"the gate: {plugin}")
    add("--site-op", type=one_of(OpChoice), choices=list(OpChoice), default=OpChoice.OPS, help=f"sites: {plugin}")
    targets = ["ort", *map(str, Target)]
    add(
        "--target",
        action="append",
        choices=targets,
        help="trt and trt-rtx build engines beside the bundle (default ort)",
    )
    add_engine_options(command)
    add_quiet(command)
    command.set_defaults(run=run, interrupted="interrupted; nothing was published")


def _add_hot(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("adapters that a running session can load and unload").add_argument
    add(
        "--adapters-as",
        type=one_of(AdaptersAs),
        choices=list(AdaptersAs),
        default=AdaptersAs.WEIGHTS,
        help="weights of the dynamic graph (default), or its inputs",
    )
    add("--max-total-rank", type=count, metavar="N", help="of all adapters loaded at a time")
    add("--max-experts", type=count, metavar="M", help="default: as many as are given")
    add(
        "--hot-targets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="modules that adapters may change besides those of the given ones; all-linear for every Linear block",
    )


def _hot_spec(args: argparse.Namespace) -> HotSpec | None:
    if args.adapters_as is AdaptersAs.INPUTS:
        if args.max_total_rank is None:
            raise InputError("needs a limit", where="--adapters-as inputs", fix="--max-total-rank N")
        return HotSpec(args.max_total_rank, args.max_experts, tuple(args.hot_targets))
    given = {"--max-total-rank": args.max_total_rank, "--max-experts": args.max_experts}
    for flag in [flag for flag, value in given.items() if value] + ["--hot-targets"] * bool(args.hot_targets):
        raise InputError("is of adapters that are inputs", where=flag, fix="--adapters-as inputs")
    return None


def _add_merge(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("how a static mix becomes one update a module").add_argument
    add(
        "--merge",
        type=one_of(MergeMethod),
        choices=list(MergeMethod),
        help="default linear, the exact weighted sum of the experts' deltas",
    )
    add("--density", type=share, metavar="SHARE", help="of each delta's entries that stays: ties, dare_*, magnitude_*")
    add("--merge-rank", type=count, metavar="R", help="of svd (default the largest expert's); cuts ties, dare_* too")
    add("--keep", type=share, metavar="SHARE", help="of the rank-one terms that rank-select keeps (default 0.5)")
    add("--seed", type=natural, metavar="N", help="of dare_*, and of --router arrow (default 0)")
    add("--save-adapter", type=Path, metavar="DIR", help="write the merged update as a PEFT LoRA folder, too")


def _add_router(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("what weighs the experts of a dynamic graph, token by token").add_argument
    kinds = list(RouterKind)
    add("--router", type=one_of(RouterKind), choices=kinds, help="default xlora where there is a gate; --keep, --seed")
    add("--arrow-top-k", type=count, metavar="K", help="experts of a token and module (default 3, or all if fewer)")
    add("--arrow-temperature", type=positive, metavar="T", help="of the softmax over them (default 1)")
    add("--arrow-gks", nargs="+", default=[], metavar="NAME", help="adapters to subtract the mean of from the others")


def run(args: argparse.Namespace) -> int:
    """Build and publish."""
    spec = _build_spec(args)
    engines = [engine_spec(args, target) for target in spec.targets]
    from exporter.progress import shown_stages

    has_plugins = OpChoice.PLUGIN in (spec.gate_op, spec.site_op)
    for asked in engines:
        from exporter.engines.link import is_linked, run_linked
        from exporter.engines.tensorrt import load_builder

        load_builder(asked.target)  # minutes before it is needed
        if has_plugins and not is_linked(asked.target):
            return run_linked(args.arguments)
    with shown_stages(quiet=args.quiet) as clock:
        from exporter.build_bundle import build as build_bundle

        silence_transformers()
        bundle = build_bundle(spec, clock)
    if not args.quiet:
        _print_bundle(bundle, clock)
        if args.merge is not None or args.save_adapter is not None:
            _print_merges(bundle)
    print(bundle.root)
    for asked in engines:
        build_engines_beside(bundle, asked, quiet=args.quiet)
    return 0


def _build_spec(args: argparse.Namespace) -> BuildSpec:
    from exporter.variants import variants_from_words
    from runtime.mix_file import mix_from_word

    return BuildSpec(
        adapters=tuple(args.adapters),
        base=args.base,
        gate=args.gate,
        tokenizer=args.tokenizer,
        modes=tuple(dict.fromkeys(args.mode)),
        mix=None if args.mix is None else mix_from_word(args.mix),
        variants=variants_from_words(args.variants),
        hot=_hot_spec(args),
        scalings=args.scalings,
        merge=_merge(args),
        router=_router(args),
        save_adapter=args.save_adapter,
        out=args.out,
        emit=args.emit,
        dtype=args.dtype,
        cache=args.cache,
        onnxruntime=not args.no_onnxruntime_form,
        quantize=quantize_info(args),
        calibration=args.quantize_texts,
        accept_loss=args.accept_loss,
        gate_op=args.gate_op,
        site_op=args.site_op,
        topk_softmax=args.topk_softmax,
        verify=args.verify,
        prompts=tuple(args.prompts),
        task=args.task,
        pooling=args.pooling,
        normalize=args.normalize,
        overwrite=args.overwrite,
        threads=args.threads,
        targets=tuple(Target(name) for name in dict.fromkeys(args.target or ()) if name != "ort"),
    )


def _merge(args: argparse.Namespace) -> MergeInfo:
    """--keep and --seed are the merge's unless only the router has them."""
    method = args.merge or MergeMethod.LINEAR
    has_keep = method is MergeMethod.RANK_SELECT or args.router is not RouterKind.RANK_SELECT
    has_seed = method in (MergeMethod.DARE_LINEAR, MergeMethod.DARE_TIES) or args.router is not RouterKind.ARROW
    return MergeInfo(
        method=method,
        density=args.density,
        rank=args.merge_rank,
        keep=args.keep if has_keep else None,
        seed=args.seed if has_seed else None,
    )


def _router(args: argparse.Namespace) -> RouterSpec | None:
    general = tuple(dict.fromkeys(args.arrow_gks))
    if args.router is not None:
        return RouterSpec(
            args.router,
            keep=args.keep if args.router is RouterKind.RANK_SELECT else None,
            top_k=args.arrow_top_k,
            temperature=args.arrow_temperature,
            seed=args.seed if args.router is RouterKind.ARROW else None,
            general=general,
        )
    if args.arrow_top_k is not None or args.arrow_temperature is not None or general:
        raise ExportError("these are settings of Arrow", where="--arrow-*", got="no --router", fix="add --router arrow")
    return None


def _print_bundle(bundle: Bundle, clock: StageClock) -> None:
    """The mapping column -> name -> folder, the checks, and what the build cost."""
    from exporter.progress import size_text

    for expert in bundle.manifest.experts:
        print(f"column {expert.column}  {expert.name}  from {expert.folder} (key {expert.key}, rank {expert.rank})")
    for report in bundle.manifest.reports:
        head = f"graph {report.graph}: verification {report.level}, stage {report.stage}, stage B {report.stage_b}"
        print(f"{head}\n" + "\n".join(check_line(check) for check in report.checks))
        if report.twin is not None:
            print("  no number of this model was compared; of a small random model of its kind:")
            print("\n".join(check_line(check) for check in report.twin.checks))
        if report.loss is not None:
            print(loss_line(report.loss))
    if bundle.manifest.quantization is not None:
        print(f"quantised {quantization_text(bundle.manifest.quantization)}: {_stored_text(bundle)}")
    if clock.memory is not None:
        anonymous, mapped = size_text(clock.memory.anonymous), size_text(clock.memory.mapped)
        print(f"{sum(clock.seconds.values()):.1f} s, peak memory {anonymous} anonymous and {mapped} mapped")


def _stored_text(bundle: Bundle) -> str:
    """What the weight files take."""
    from exporter.progress import size_text

    files = bundle.artifacts("weights")
    return f"weights of {size_text(sum(file.size for file in files))} in {len(files)} files"


def _print_merges(bundle: Bundle) -> None:
    """Module by module and in total: the rank added, and how far the merge is from the exact weighted sum."""
    log = json.loads((bundle.root / BUILD_LOG_NAME).read_text(encoding="utf-8"))
    for name, merge in log["merges"].items():
        info = next(graph.merge for graph in bundle.manifest.graphs if graph.name == name)
        lines = [*merge["sites"], merge["total"]]
        width = max(len(line["path"]) for line in lines)
        print(f"{f'graph {name}, {info.method if info else MergeMethod.LINEAR}':<{width}}   rank   relative error")
        for line in lines:
            error = "exact sum is 0" if line["error"] is None else f"{line['error']:.3g}"
            print(f"{line['path']:<{width}}  {line['rank']:>5}   {error}")
