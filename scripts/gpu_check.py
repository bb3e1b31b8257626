"""What only a GPU can tell: engines built here against recordings of PyTorch, their speed, and the `gpu` tests.

`--pack KIT` makes what a machine without a network needs; there, `--kit KIT` unpacks it and runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command import run_command
from runtime.errors import InputError, MachineError, UserError
from scripts.gpu_kit import LIBRARIES, MODELS, SITE, fetch_packages, kit_digest, pack, read_pins, unpack
from scripts.gpu_report import Report, Section, Status, write_report

if TYPE_CHECKING:
    from runtime.engines import Target

ROOT = Path(__file__).resolve().parents[1]
UNPACKED = "XLORA_GPU_KIT"  # set for the process that runs from an unpacked kit
PACKAGES = ("tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "numpy", "torch", "onnxruntime", "onnxruntime-gpu")


def main(argv: Sequence[str] | None = None) -> int:
    """0 all that ran was right, 2 something was wrong, 3 no GPU."""
    args = parser().parse_args(argv)
    command = make_kit if args.pack else check
    return run_command(lambda: command(args), packages=".[engine,trt-rtx]")


def parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    add = parser.add_argument
    add("--pack", type=Path, metavar="KIT", help="make the kit, a new folder; needs a package index and torch")
    add("--python", default="3.12", metavar="3.12", help="the Python of the GPU machine (with --pack)")
    add("--with-runtime", action="store_true", help="also numpy, pydantic and tokenizers (with --pack)")
    add("--fast", action="store_true", help="pack in seconds, a larger kit (with --pack)")
    add("--kit", type=Path, metavar="KIT", help="run from this kit")
    add("--out", type=Path, default=ROOT / "out" / "gpu_check", metavar="DIR", help="where the report goes")
    return parser


def make_kit(args: argparse.Namespace) -> int:
    """Packages, bundles and recordings into parts."""
    if args.pack.exists():  # minutes before it is needed
        raise InputError("is there already", where=str(args.pack), need="a new folder for the kit")
    from scripts.gpu_models import make_models

    with tempfile.TemporaryDirectory(prefix="xlora-kit-") as folder:
        payload = Path(folder) / "payload"
        make_models(payload / MODELS, tell)
        pins = read_pins(ROOT / "constraints.txt")
        fetch_packages(payload / SITE, pins, args.python, runtime=args.with_runtime, tell=tell)
        tell("packing" + ("" if args.fast else " (minutes)"))
        parts = pack(payload, args.pack, python=args.python, fast=args.fast)
    print(f"{args.pack}: {len(parts)} parts, {sum(part.size for part in parts) / 2**20:.1f} MiB")
    return 0


def check(args: argparse.Namespace) -> int:
    """Run everything and write the report."""
    is_bare = not find_spec("pydantic")  # even asking the driver needs it
    if not (args.kit and is_bare):
        from scripts.gpu_machine import NO_GPU, gpu

        if gpu() is None:
            raise MachineError(NO_GPU, fix="run this on the GPU machine; scripts/gpu_check --pack KIT prepares for one")
    if args.kit and UNPACKED not in os.environ:
        return restart_in_kit(args.kit, args.out)
    report = Report(machine_facts())
    models = find_models(args.out)
    run_all(report, models)
    for path in write_report(report, args.out):
        print(path)
    return InputError.exit_code if report.has_failed else 0


def restart_in_kit(kit: Path, out: Path) -> int:
    """The same command with the kit's packages; the loader reads LD_LIBRARY_PATH only when a process starts."""
    folder = out / f"kit-{kit_digest(kit)}"
    if not folder.exists():
        unpack(kit, folder)
    environment = os.environ | {
        UNPACKED: str(folder),
        "PYTHONPATH": os.pathsep.join([str(folder / SITE), str(ROOT)]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder / LIBRARIES), os.environ.get("LD_LIBRARY_PATH", "")]),
    }
    return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


def find_models(out: Path) -> list[Path]:
    """The kit's, or freshly made ones where torch is installed."""
    if UNPACKED in os.environ:
        return sorted((Path(os.environ[UNPACKED]) / MODELS).iterdir())
    if not find_spec("torch"):
        raise MachineError("nothing to check: no kit, and no torch to make models with", fix="--kit KIT")
    from scripts.gpu_models import make_models

    folder = out / MODELS
    if not folder.exists():
        part = folder.with_name(f"{MODELS}.part")
        make_models(part, tell)
        part.rename(folder)
    return sorted(folder.iterdir())


def machine_facts() -> dict[str, str]:
    """GPU, driver and versions."""
    from scripts.gpu_machine import gpu

    found = gpu()
    assert found is not None  # `check` asked
    facts = {"GPU": found.name, "compute capability": found.compute_capability, "driver": driver_version()}
    facts |= {"platform": platform.platform(), "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def driver_version() -> str:
    """As nvidia-smi names it; a Jetson has none."""
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known (no nvidia-smi)"


def run_all(report: Report, models: Sequence[Path]) -> None:
    """Section by section; what fails stops nothing else."""
    from scripts.gpu_machine import gpu, installed_targets, is_listed

    found = gpu()
    assert found is not None
    bandwidth = attempt("memory bandwidth", memory_bandwidth)
    report.sections.append(bandwidth)
    speed = float(bandwidth.rows[0]["bytes a second"]) if bandwidth.rows else None
    for target in installed_targets():
        for model in models:
            section = attempt(f"{target} {model.name}", engine_section, model, target, speed)
            if section.status is Status.FAILED and not is_listed(target, found):
                unlisted = f"{target.product} does not list compute capability {found.compute_capability}"
                section = Section(section.name, Status.NOT_RUN, f"{unlisted}; tried: {section.why}")
            report.sections.append(section)
    if not installed_targets():
        report.sections.append(
            Section("TensorRT", Status.NOT_RUN, "neither TensorRT nor TensorRT for RTX is installed")
        )
    for model in models:
        report.sections.append(attempt(f"onnxruntime cuda {model.name}", ort_section, model, speed))
        report.sections.append(attempt(f"torch {model.name}", torch_section, model))
    report.sections.append(attempt("plugin kernels", plugin_section))
    report.sections.append(attempt("gpu tests", tests_section))


def attempt(name: str, run: Callable[..., Section], *words: object) -> Section:
    """One section in a process of its own: TensorRT and drivers may crash, and memory is given back."""
    tell(name)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(told, run, name, *words).result()
    except BrokenProcessPool:
        return Section(name, Status.FAILED, "the process died")


def told(run: Callable[..., Section], name: str, *words: object) -> Section:
    """The section, or why there is none."""
    try:
        return run(name, *words)
    except MachineError as error:
        return Section(name, Status.NOT_RUN, str(error))
    except ModuleNotFoundError as error:
        return Section(name, Status.NOT_RUN, f"not installed: {error.name}")
    except UserError as error:
        return Section(name, Status.FAILED, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it was, the other sections go on
        return Section(name, Status.FAILED, f"{type(error).__name__}: {error}")


def memory_bandwidth(name: str) -> Section:
    """What copies on the device reach."""
    from scripts.gpu_timing import measure_bandwidth

    return Section(name, Status.OK, rows=({"bytes a second": measure_bandwidth()},))


def engine_section(name: str, model: Path, target: Target, bandwidth: float | None) -> Section:
    """Build the engine for this GPU, compare it with the recording, time it."""
    from exporter.engines import EngineSpec, build_engines
    from runtime.bundle import open_bundle
    from scripts.gpu_kit import BUNDLE
    from scripts.gpu_machine import capabilities, gpu

    found = gpu()
    assert found is not None
    bundle = open_bundle(model / BUNDLE)
    build_engines(bundle, EngineSpec(target, compute_capabilities=capabilities(target, found)))
    return compared_and_timed(name, model, bandwidth, backend=target.value)


def ort_section(name: str, model: Path, bandwidth: float | None) -> Section:
    """The same on ONNX Runtime's CUDA provider, where it is installed."""
    return compared_and_timed(name, model, bandwidth, provider="cuda")


def compared_and_timed(name: str, folder: Path, bandwidth: float | None, **how: str) -> Section:
    """The numeric gates first; the times of a wrong model mean nothing."""
    from runtime.bundle import open_bundle
    from runtime.compare import compare, render
    from runtime.model import load
    from runtime.recording import load_recording, require_same_model
    from scripts.gpu_kit import BUNDLE, ON_ORT, RECORDING
    from scripts.gpu_timing import time_model

    bundle, recording = open_bundle(folder / BUNDLE), load_recording(folder / RECORDING)
    with load(bundle.root, graph=bundle.manifest.graphs[0].name, **how) as model:  # type: ignore[arg-type]
        require_same_model(recording, model.manifest, model.graph)
        found = compare(model.session, recording, accept_noise=True)
        text = render(found)
        if (on_ort := folder / ON_ORT).is_file():
            text += f"\nONNX Runtime's CPU, on the machine that made the recording:\n{on_ort.read_text()}"
        if not found.passed:
            return Section(name, Status.FAILED, "not the model: the table below has the measures", text=text)
        return Section(name, Status.OK, rows=(time_model(model, bundle, bandwidth),), text=text)


def torch_section(name: str, model: Path) -> Section:
    """The products of one decode step in torch, as a baseline."""
    from runtime.bundle import open_bundle
    from scripts.gpu_kit import BUNDLE
    from scripts.gpu_timing import time_torch

    row = time_torch(open_bundle(model / BUNDLE))
    if row is None:
        return Section(name, Status.NOT_RUN, "no torch with CUDA")
    return Section(name, Status.OK, rows=(row,))


def plugin_section(name: str) -> Section:
    """The kernels through the plugin classes, against numpy; what they change in a model is in the models' sections."""
    from scripts.gpu_kernels import check_kernels

    rows, wrong = check_kernels()
    if wrong:
        return Section(name, Status.FAILED, "; ".join(wrong), tuple(rows))
    return Section(name, Status.OK, rows=tuple(rows))


def tests_section(name: str) -> Section:
    """Every test marked `gpu`."""
    missing = [module for module in ("pytest", "torch", "transformers") if not find_spec(module)]
    if missing:
        return Section(name, Status.NOT_RUN, f"not installed: {', '.join(missing)}")
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "tests"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode:
        return Section(name, Status.FAILED, last, text=done.stdout[-8000:])
    status = Status.OK if " passed" in last else Status.NOT_RUN
    return Section(name, status, "" if status is Status.OK else last, text=done.stdout[-4000:])


def tell(text: str) -> None:
    """Progress."""
    print(f"gpu_check: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
