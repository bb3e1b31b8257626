"""What only a GPU can tell: engines built here against recordings of PyTorch, their speed, and the `gpu` tests.

`--pack KIT` makes what a machine without a network needs; there, `--kit KIT` unpacks it and runs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command import run_command
from runtime.errors import InputError, MachineError
from scripts.gpu_attempt import CUDA, LIMIT, attempt, missing_packages, require_packages, require_provider
from scripts.gpu_kit import LIBRARIES, MODELS, SITE, fetch_packages, kit_digest, pack, read_pins, unpack
from scripts.gpu_report import Report, Section, Status, write_report

if TYPE_CHECKING:
    from runtime.engines import Target

ROOT = Path(__file__).resolve().parents[1]
UNPACKED = "XLORA_GPU_KIT"  # set for the process that runs from an unpacked kit
# What bundles and recordings are made from.
SOURCES = ("exporter", "plugins", "runtime", "scripts/gpu_models.py", "examples/four-tasks")
PACKAGES = ("tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "numpy", "torch", "onnxruntime", "onnxruntime-gpu")
# What the tests marked `gpu` import, and PEFT, which makes their checkpoint.
TEST_PACKAGES = (
    "pytest", "numpy", "torch", "transformers", "peft", "safetensors", "tokenizers", "huggingface_hub",
    "google.protobuf", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "polygraphy", "pydantic", "filelock", "rich",
    "yaml",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """0 all that ran was right, 2 something was wrong, 3 no GPU."""
    args = parser().parse_args(argv)
    args.words = list(sys.argv[1:] if argv is None else argv)
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
    add("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"for each section; {LIMIT:g} unless given")
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
        return restart_in_kit(args)
    if lacks_link():
        from exporter.engines.link import run_with_link

        return run_with_link(again(args))
    report = Report(machine_facts())
    models = find_models(args.out)
    write_report(report, args.out)  # an older one is no word of this run
    for section in sections(models, args.limit):
        report.sections.append(section)
        write_report(report, args.out)
    report.is_complete = True
    for path in write_report(report, args.out):
        print(path)
    return InputError.exit_code if report.has_failed else 0


def restart_in_kit(args: argparse.Namespace) -> int:
    """The same command with the kit's packages; the loader reads LD_LIBRARY_PATH only when a process starts."""
    folder = args.out / f"kit-{kit_digest(args.kit)}"
    if not folder.exists():
        unpack(args.kit, folder)
    environment = os.environ | {
        UNPACKED: str(folder),
        "PYTHONPATH": os.pathsep.join([str(folder / SITE), str(ROOT)]),
        "LD_LIBRARY_PATH": joined(str(folder / LIBRARIES), os.environ.get("LD_LIBRARY_PATH", "")),
    }
    return subprocess.run(again(args), env=environment, check=False).returncode


def joined(*paths: str) -> str:
    """A search path without empty entries, which would be the current folder."""
    return os.pathsep.join(entry for path in paths for entry in path.split(os.pathsep) if entry)


def again(args: argparse.Namespace) -> list[str]:
    """This command, for another process."""
    return [sys.executable, "-P", str(Path(__file__).resolve()), *args.words]


def lacks_link() -> bool:
    """Whether TensorRT for RTX would end a process that adds a plugin, and a restart has not been tried."""
    from runtime.engines import Target

    if missing_packages([Target.TRT_RTX.module, "filelock"]):  # without filelock no engine is built at all
        return False
    from exporter.engines.link import PREFIX, is_linked, library

    if is_linked(Target.TRT_RTX) or PREFIX in os.environ.get("LD_LIBRARY_PATH", ""):
        return False
    try:
        library()
    except MachineError as error:  # the sections with plugins will fail, the others need no link
        tell(str(error))
        return False
    return True


def find_models(out: Path) -> list[Path]:
    """The kit's, or freshly made ones where torch is installed."""
    if UNPACKED in os.environ:
        return sorted((Path(os.environ[UNPACKED]) / MODELS).iterdir())
    if not find_spec("torch"):
        raise MachineError("nothing to check: no kit, and no torch to make models with", fix="--kit KIT")
    from scripts.gpu_models import make_models

    folder = out / f"{MODELS}-{sources_digest()}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was ended
        make_models(part, tell)
        part.rename(folder)
    return sorted(folder.iterdir())


def sources_digest(root: Path = ROOT) -> str:
    """What tells models from those of other sources."""
    digest = hashlib.sha256()
    for source in SOURCES:
        place = root / source
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for path in (path for path in files if path.is_file() and "__pycache__" not in path.parts):
            digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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


def sections(models: Sequence[Path], limit: float) -> Iterator[Section]:
    """One after the other; what fails stops nothing else."""
    from scripts.gpu_machine import gpu, installed_targets, is_listed

    def tried(name: str, run: Callable[..., Section], *words: object) -> Section:
        tell(name)
        return attempt(name, run, *words, limit=limit)

    found = gpu()
    assert found is not None
    bandwidth = tried("memory bandwidth", memory_bandwidth)
    yield bandwidth
    speed = float(bandwidth.rows[0]["bytes a second"]) if bandwidth.rows else None
    for target in installed_targets():
        for model in models:
            section = tried(f"{target} {model.name}", engine_section, model, target, speed)
            if section.status is Status.FAILED and not is_listed(target, found):
                unlisted = f"{target.product} does not list compute capability {found.compute_capability}"
                section = replace(section, status=Status.NOT_RUN, why=f"{unlisted}; tried: {section.why}")
            yield section
    if not installed_targets():
        yield Section("TensorRT", Status.NOT_RUN, "neither TensorRT nor TensorRT for RTX is installed")
    for model in models:
        yield tried(f"onnxruntime cuda {model.name}", ort_section, model, speed)
        yield tried(f"torch {model.name}", torch_section, model)
    yield tried("plugin kernels", plugin_section)
    yield tried("gpu tests", tests_section)


def memory_bandwidth(name: str) -> Section:
    """What copies on the device reach."""
    require_packages(CUDA)
    from scripts.gpu_timing import measure_bandwidth

    return Section(name, Status.OK, rows=({"bytes a second": measure_bandwidth()},))


def engine_section(name: str, model: Path, target: Target, bandwidth: float | None) -> Section:
    """Build the engine for this GPU, compare it with the recording, time it."""
    require_packages(target.module, CUDA, "filelock")
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
    from runtime.backends.ort import PROVIDERS

    require_provider(PROVIDERS["cuda"][0])
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
    from plugins.operators import DTYPES
    from scripts.gpu_machine import installed_targets

    require_packages(CUDA, *(() if installed_targets() else ("tensorrt",)))  # either TensorRT serves
    from scripts.gpu_kernels import check_kernels

    rows, wrong = check_kernels()
    if wrong:
        return Section(name, Status.FAILED, "; ".join(wrong), tuple(rows))
    missing = set(DTYPES) - {row["dtype"] for row in rows}
    why = f"this GPU does not compute in {', '.join(missing)}" if missing else ""
    return Section(name, Status.OK, why, tuple(rows))


def tests_section(name: str) -> Section:
    """Every test marked `gpu`."""
    require_packages(*TEST_PACKAGES)
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "tests/gpu"]
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
