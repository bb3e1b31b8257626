"""Where a decode step's time goes on ONNX Runtime's CPU provider: kinds of steps, both forms of a graph, operators.

python scripts/profile_steps.py BUNDLE --context 64 --threads 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter, sleep
from typing import Any

import numpy as np
import onnxruntime

from runtime.backends import open_session
from runtime.bundle import Bundle, open_bundle
from runtime.huge_pages import restart_for_huge_pages
from runtime.manifest import GraphInfo, OnnxRuntimeForm
from runtime.rows import Rows
from runtime.session import Session, SessionSettings
from runtime.signature import SCALINGS, CacheStyle, Signature

CHUNK, BURST, PAUSE = 256, 5, 0.03  # a pause: threads of another session spin for a while
REST = 8  # operators that are shown
MIX = 0.25  # scalings of a main row


@dataclass(frozen=True, slots=True)
class StepKind:
    """One kind of step: what its rows' scalings are, and whether it wants logits."""

    name: str
    scalings: tuple[float, ...]
    wants_logits: bool = True


KINDS = (
    StepKind("base", (0.0,)),
    StepKind("scaling pass", (0.0,), wants_logits=False),
    StepKind("main pass", (MIX,)),
    StepKind("paired", (0.0, MIX)),
)


def main() -> None:
    """Print one table of times and one of operators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    for name, value in {"context": 64, "threads": 2, "rounds": 8, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    bundle = open_bundle(args.bundle, check_digests=False)
    settings = SessionSettings(bundle.manifest.base.max_positions, threads=args.threads)
    cases: dict[str, Callable[[], object]] = {}
    sessions = []
    for graph in bundle.manifest.graphs:
        for form in forms(graph):
            session = open_session("ort", bundle.file(form.path), form.signature, settings)
            sessions.append(session)
            cases |= steps_of(session, form.path, args.context)
    print(f"ms of a step after {args.context} tokens, {args.threads} threads, onnxruntime {onnxruntime.__version__}\n")
    for name, times in interleaved(cases, args.rounds).items():
        low, median, high = (1e3 * time for time in quantiles(times, n=4))
        print(f"{name:40} {median:8.2f}   ({low:.2f} to {high:.2f})")
    for session in sessions:
        session.close()
    for graph in bundle.manifest.graphs:
        for form in forms(graph):
            print(f"\n{form.path}: ms by operator, as ONNX Runtime's profiler has it (each node costs some µs more)")
            for name, (count, time) in operators(bundle, form, args.threads, args.context, args.steps).items():
                print(f"{name:40} {time:8.2f}   in {count} nodes")


def forms(graph: GraphInfo) -> list[GraphInfo | OnnxRuntimeForm]:
    """The graph, and its form for this provider."""
    return [form for form in (graph, graph.onnxruntime) if form is not None]


def steps_of(session: Session, name: str, context: int) -> dict[str, Callable[[], object]]:
    """Kind -> one more step of it, in slots that hold `context` tokens."""
    scalings = session.signature.input(SCALINGS)
    session.allocate(2)
    for start in range(0, context, CHUNK):
        fill = rows_of(session, StepKind("", (0.0, MIX), wants_logits=False), min(CHUNK, context - start))
        session.step(fill)
    kinds = KINDS if scalings is not None else KINDS[:1]
    return {f"{name}, {kind.name}": lambda kind=kind: session.step(rows_of(session, kind, 1)) for kind in kinds}  # type: ignore[misc]


def rows_of(session: Session, kind: StepKind, width: int) -> Rows:
    """The kind's rows in the first slots."""
    batch, scalings = len(kind.scalings), session.signature.input(SCALINGS)
    mix = None
    if scalings is not None:
        column = np.array(kind.scalings, np.float32)[:, None, None, None]
        mix = np.broadcast_to(column, (batch, width, *scalings.shape[2:]))
    index = np.full((batch, 1 if kind.wants_logits else 0), width - 1)
    return Rows(np.full((batch, width), 5), np.full(batch, width), slice(0, batch), mix, index)


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            sleep(PAUSE)
            run()
            for _ in range(BURST):
                start = perf_counter()
                run()
                times[name].append(perf_counter() - start)
    return times


def operators(
    bundle: Bundle, form: GraphInfo | OnnxRuntimeForm, threads: int, context: int, steps: int
) -> dict[str, tuple[int, float]]:
    """Operator -> nodes a step, ms a step; the dearest ones."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        engine = onnxruntime.InferenceSession(str(bundle.file(form.path)), options, ["CPUExecutionProvider"])
        binding = bound(engine.io_binding(), form.signature, context)
        for _ in range(steps + 1):
            engine.run_with_iobinding(binding)
        events = json.loads(Path(engine.end_profiling()).read_text())
    runs = [event for event in events if event["name"] == "model_run"]
    warm = runs[0]["ts"] + runs[0]["dur"]
    count: Counter[str] = Counter()
    time: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("kernel_time") and event["ts"] > warm:
            count[event["args"]["op_name"]] += 1
            time[event["args"]["op_name"]] += event["dur"]
    return {name: (count[name] // steps, us / steps / 1e3) for name, us in time.most_common(REST)}


def bound(binding: Any, signature: Signature, context: int) -> Any:
    """A step of one row and one token, its caches in place where the graph has them so."""
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds_of(signature, context).items()
    }
    aliases = {carry.output: carry.input for carry in signature.carries if carry.style is CacheStyle.ALIAS}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for spec in signature.outputs:
        if spec.name in aliases:
            binding.bind_ortvalue_output(spec.name, values[aliases[spec.name]])
        else:
            binding.bind_output(spec.name)
    return binding


def feeds_of(signature: Signature, context: int) -> dict[str, Any]:
    """One row, one token, a cache with room for it."""
    sizes = {"B": 1, "S": 1, "K": 1, "C": context + 1}
    feeds: dict[str, Any] = {}
    for spec in signature.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        is_place = spec.name in ("position_ids", "cache_lengths")
        value = context if is_place else 5 if spec.name == "input_ids" else 0
        feeds[spec.name] = np.full(shape, value if spec.dtype == "int64" else MIX, spec.dtype)
    return feeds


if __name__ == "__main__":
    restart_for_huge_pages()
    main()
