"""Side by side in one run, interleaved: X-LoRA through our runtime, the plain base through it, and PEFT X-LoRA.

    scripts/bench [--rounds 5] [--json FILE] [--checkpoint DIR] [--no-peft]

Writes a table and JSON. Ratios within one run are what counts: absolute times move with the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from runtime.bundle import open_bundle
from runtime.model import Model, load
from runtime.passes import ExactPasses, Passes, Routing
from runtime.routing import routing_for

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = (64, 256, 1024)
PREFILL = 512
STEPS = 8  # decode steps per sample of ours
OURS_PER_ROUND = 3  # a shared machine is noisy; PEFT's samples last minutes
SEED = 7


@dataclass(slots=True)
class Series:
    """Samples in milliseconds of one measure of one subject."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def as_dict(self) -> dict[str, object]:
        return {
            "median_ms": self.median,
            "min_ms": min(self.samples),
            "max_ms": max(self.samples),
            "n": len(self.samples),
        }


Subject = Callable[[], float]  # one sample in milliseconds


def main() -> None:
    """Checkpoint, build, measure, print."""
    args = parser().parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="xlora-bench-") as folder:
        work = args.checkpoint or Path(folder) / "checkpoint"
        if args.checkpoint is None:
            run([sys.executable, ROOT / "scripts" / "make_large.py", work])
        console.print("building the bundle")
        built = build(work, Path(folder) / "bundle")
        bundle = Path(folder) / "bundle"
        peft = Peft(work) if args.peft else None
        correct = {"8 greedy tokens after 32": agreement(bundle, peft)} if peft else {}
        series = measure(bundle, peft, args.rounds, console)
    result = {
        "machine": machine(),
        "build": built,
        "agreement": correct,
        "series": {k: s.as_dict() for k, s in series.items()},
    }
    result["ratios"] = ratios(series)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rounds", type=int, default=5)
    result.add_argument("--json", type=Path)
    result.add_argument("--checkpoint", type=Path, help="made by make_large.py; default: the 125 M bench model")
    result.add_argument("--no-peft", dest="peft", action="store_false")
    return result


def run(command: list[object]) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def build(checkpoint: Path, bundle: Path) -> dict[str, object]:
    """One process, so that its peak memory is its own; the plain base is the static graph of the empty mix."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "exporter", "build", "--adapters", checkpoint / "xlora", "--out", bundle]
    run([*command, "--mode", "dynamic", "static", "--mix", "base", "--verify", "quick", "-q"])
    log = json.loads((bundle / "build.json").read_text())
    figures = {name: log[name] for name in ("seconds", "peak_bytes")}  # its notes name folders of this machine
    return {"total_seconds": time.perf_counter() - started, **figures}


@contextmanager
def our_passes(bundle: Path) -> Iterator[tuple[Model, dict[str, Callable[[], Passes]]]]:
    """The dynamic graph's model, and by name what opens a batch of one; all freed at the end."""
    dynamic, plain = load(bundle, graph="dynamic", threads=2), load(bundle, graph="static", threads=2)
    manifest = open_bundle(bundle, check_digests=False).manifest
    base, gate = routing_for(manifest, dynamic.graph, {}), routing_for(manifest, dynamic.graph, None)
    try:
        yield (
            dynamic,
            {
                "exact": lambda: ExactPasses(dynamic.session, [gate]),
                "base in dynamic": lambda: ExactPasses(dynamic.session, [base]),
                "plain base": lambda: ExactPasses(plain.session, [Routing(None)]),
            },
        )
    finally:
        dynamic.session.close()
        plain.session.close()


def our_subjects(model: Model, opened: dict[str, Callable[[], Passes]]) -> dict[str, Subject]:
    """Everything of ours that is timed."""
    decode = {
        f"decode {name} @{length}": decode_subject(opener, prompt(model, length))
        for name, opener in opened.items()
        for length in CONTEXTS
    }
    prefill = {
        f"prefill {name} {PREFILL}": prefill_subject(opener, prompt(model, PREFILL)) for name, opener in opened.items()
    }
    return decode | prefill


def peft_subjects(peft: Peft, model: Model) -> dict[str, Subject]:
    """The same of PEFT."""
    decode = {f"decode PEFT @{length}": peft.decode_subject(prompt(model, length)) for length in CONTEXTS}
    return decode | {f"prefill PEFT {PREFILL}": peft.prefill_subject(prompt(model, PREFILL))}


def agreement(bundle: Path, peft: Peft) -> bool:
    """Whether both say the same."""
    with our_passes(bundle) as (model, opened):
        ids = prompt(model, 32)
        return greedy(opened["exact"](), ids, 8) == peft.greedy(ids, 8)


def prompt(model: Model, length: int) -> np.ndarray:
    """Seeded ids [1, length]."""
    return np.random.default_rng(SEED).integers(3, model.vocab_size, (1, length))


def decode_subject(opener: Callable[[], Passes], ids: np.ndarray) -> Subject:
    """ms per token over STEPS cached steps after the prompt; the prefill is not timed."""

    def sample() -> float:
        passes, one = opener(), np.array([1])
        token = passes.forward(ids, np.array([ids.shape[1]])).argmax(-1)[:, None]
        token = passes.forward(token, one).argmax(-1)[:, None]  # the first step binds memory
        started = time.perf_counter()
        for _ in range(STEPS):
            token = passes.forward(token, one).argmax(-1)[:, None]
        return (time.perf_counter() - started) / STEPS * 1e3

    return sample


def prefill_subject(opener: Callable[[], Passes], ids: np.ndarray) -> Subject:
    """ms to the first token."""

    def sample() -> float:
        passes = opener()
        started = time.perf_counter()
        passes.forward(ids, np.array([ids.shape[1]]))
        return (time.perf_counter() - started) * 1e3

    return sample


def greedy(passes: Passes, ids: np.ndarray, count: int) -> list[int]:
    """The first `count` tokens."""
    tokens = [int(passes.forward(ids, np.array([ids.shape[1]]))[0].argmax())]
    while len(tokens) < count:
        tokens.append(int(passes.forward(np.array([[tokens[-1]]]), np.array([1]))[0].argmax()))
    return tokens


class Peft:
    """PEFT X-LoRA as its users run it: `generate`, which recomputes everything for every token."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from peft import PeftConfig, PeftModel
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(2)
        self.torch = torch
        base = AutoModelForCausalLM.from_pretrained(checkpoint / "base", dtype=torch.float32)
        base.config.use_cache = False
        config = PeftConfig.from_pretrained(str(checkpoint / "xlora"))
        config.adapters = {k: str((checkpoint / "xlora" / v).resolve()) for k, v in config.adapters.items()}
        self.model = PeftModel.from_pretrained(base, str(checkpoint / "xlora"), config=config).eval()

    def _generate(self, ids: np.ndarray, count: int) -> list[int]:
        with self.torch.no_grad():
            out = self.model.generate(
                input_ids=self.torch.from_numpy(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
        return out[0, ids.shape[1] :].tolist()

    def greedy(self, ids: np.ndarray, count: int) -> list[int]:
        return self._generate(ids, count)

    def decode_subject(self, ids: np.ndarray) -> Subject:
        """ms per token of `generate` at this length: two tokens, averaged."""

        def sample() -> float:
            started = time.perf_counter()
            self._generate(ids, 2)
            return (time.perf_counter() - started) / 2 * 1e3

        return sample

    def prefill_subject(self, ids: np.ndarray) -> Subject:
        def sample() -> float:
            started = time.perf_counter()
            self._generate(ids, 1)
            return (time.perf_counter() - started) * 1e3

        return sample


def measure(bundle: Path, peft: Peft | None, rounds: int, console: Console) -> dict[str, Series]:
    """All subjects in turn, round by round, after a warm-up.

    Ours are loaded anew for each round, since where the weights come to lie in memory moves a step by a tenth, and
    sampled several times, since they are cheap.
    """
    series: dict[str, Series] = {}
    for number in range(rounds):
        console.print(f"round {number + 1} of {rounds}", highlight=False)
        with our_passes(bundle) as (model, opened):
            ours = our_subjects(model, opened)
            theirs = peft_subjects(peft, model) if peft else {}
            warm_up = [*ours.values(), *theirs.values()] if number == 0 else [*ours.values()]
            for subject in warm_up:
                subject()
            for name, subject in [*ours.items()] * OURS_PER_ROUND + [*theirs.items()]:
                series.setdefault(name, Series()).samples.append(subject())
    return series


def ratios(series: dict[str, Series]) -> dict[str, float]:
    """The promised ones; above 1 means as described."""

    def of(a: str, b: str) -> float | None:
        return series[a].median / series[b].median if a in series and b in series else None

    wanted = {
        **{f"exact is faster than PEFT @{n}": of(f"decode PEFT @{n}", f"decode exact @{n}") for n in CONTEXTS},
        "exact costs x plain base @64": of("decode exact @64", "decode plain base @64"),
        "base in dynamic costs x plain base @64": of("decode base in dynamic @64", "decode plain base @64"),
        "prefill is faster than PEFT": of(f"prefill PEFT {PREFILL}", f"prefill exact {PREFILL}"),
    }
    return {name: value for name, value in wanted.items() if value is not None}


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    packages = ("onnxruntime", "torch", "transformers", "peft", "numpy")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def show(result: dict[str, object]) -> None:
    """Two tables on stdout."""
    console = Console()
    table = Table("measure", "median ms", "min", "max", title="per token (decode) or in all (prefill), batch 1, fp32")
    for name, s in result["series"].items():  # type: ignore[attr-defined]
        table.add_row(name, *(f"{s[key]:.1f}" for key in ("median_ms", "min_ms", "max_ms")))
    console.print(table)
    table = Table("ratio", "value")
    for name, value in result["ratios"].items():  # type: ignore[attr-defined]
        table.add_row(name, f"{value:.2f}x")
    console.print(table)
    console.print(result["machine"], result["agreement"])
    built = result["build"]
    console.print(f"build: {built['total_seconds']:.0f} s, peak {built['peak_bytes']}", highlight=False)  # type: ignore[index]


if __name__ == "__main__":
    main()
