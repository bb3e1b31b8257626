"""Build a bundle of a large checkpoint without comparing numbers, and report what it cost: time, memory, same bytes.

python scripts/make_large.py DIR --like mistral-7b
python scripts/export_large.py DIR/xlora OUT --dtype bfloat16

Linux only: memory is sampled from /proc of the build's process, in which nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from safetensors import safe_open

from exporter.store import TRANSPOSED

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.05
COMPARED = 24  # tensors, spread over the model


@dataclass(frozen=True, slots=True)
class Cost:
    """What a build of a checkpoint took."""

    seconds: float
    stages: dict[str, float]
    checkpoint_bytes: int  # of the base
    bundle_bytes: int
    peak_anonymous: int
    peak_resident: int  # anonymous and mapped together, as the kernel counted it
    copied_files: int  # that lie in the bundle with the digest they have in the checkpoint
    compared_tensors: int  # whose bytes were compared with the checkpoint's


def main() -> None:
    """Build, check, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path, help="where it is not beside the adapters, in base/")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base = args.base or args.adapters.parent / "base"
    cost = measure(args.adapters, base, args.out, args.dtype)
    print(json.dumps(asdict(cost)) if args.json else table(cost))


def measure(adapters: Path, base: Path, out: Path, dtype: str) -> Cost:
    """Build in a process of its own, then compare the bundle with the checkpoint; AssertionError where they differ."""
    words = ["-m", "exporter", "build", "--adapters", adapters, "--base", base, "--out", out]
    words += ["--dtype", dtype, "--verify", "structure", "-q"]
    started = time.perf_counter()
    anonymous, resident = peaks([sys.executable, *map(str, words)])
    seconds = time.perf_counter() - started
    manifest = json.loads((out / "manifest.json").read_text())
    sources = {source["sha256"] for source in manifest["sources"]}
    onnx.checker.check_model(str(out / "dynamic.onnx"))
    return Cost(
        seconds,
        json.loads((out / "build.json").read_text())["seconds"],
        sum(path.stat().st_size for path in base.glob("*.safetensors")),
        sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        anonymous,
        resident,
        sum(artifact["sha256"] in sources for artifact in manifest["artifacts"] if artifact["kind"] == "weights"),
        compared(out / "dynamic.onnx", base, getattr(torch, dtype)),
    )


def peaks(command: Sequence[str]) -> tuple[int, int]:
    """The most anonymous and the most resident bytes of a process; raises where it fails."""
    anonymous = resident = 0
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except FileNotFoundError:
                break
            anonymous, resident = max(anonymous, field(text, "RssAnon")), max(resident, field(text, "VmHWM"))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return anonymous, resident


def field(text: str, name: str) -> int:
    """A size of /proc/PID/status in bytes; 0 while there is none."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def compared(graph: Path, base: Path, dtype: torch.dtype) -> int:
    """How many weights of the graph, spread over it, hold the very bytes of the checkpoint's tensor.

    It is rounded to `dtype`; a NAME.T holds its transpose.
    """
    values = {name: value.const_value for name, value in ir.load(graph).graph.initializers.items()}
    files = {key: path for path in sorted(base.glob("*.safetensors")) for key in keys_of(path)}
    shared = sorted(name for name in values if name.removesuffix(TRANSPOSED) in files)
    chosen = shared[:: max(1, len(shared) // COMPARED)]
    for name in chosen:
        tensor, key = values[name], name.removesuffix(TRANSPOSED)
        assert isinstance(tensor, ir.ExternalTensor), name
        with safe_open(files[key], "pt") as file:
            stored = file.get_tensor(key).to(dtype)
        stored = stored if key == name else stored.mT
        assert tensor.shape == list(stored.shape), name
        assert tensor.tobytes() == bytes_of(stored), f"{name} is not the checkpoint's"
        tensor.release()
    return len(chosen)


def keys_of(path: Path) -> Sequence[str]:
    """The names of a file's tensors."""
    with safe_open(path, "pt") as file:
        return list(file.keys())


def bytes_of(tensor: Any) -> bytes:
    """As they lie in memory."""
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def table(cost: Cost) -> str:
    """A line a figure."""
    gigabytes = {name: value / 1e9 for name, value in asdict(cost).items() if name.endswith("_bytes")}
    lines = [f"{cost.seconds:8.1f} s in all"]
    lines += [f"{seconds:8.1f} s {stage}" for stage, seconds in cost.stages.items()]
    lines += [f"{value:8.2f} GB {name.removesuffix('_bytes')}" for name, value in gigabytes.items()]
    lines += [
        f"{cost.peak_anonymous / 1e9:8.2f} GB peak anonymous",
        f"{cost.peak_resident / 1e9:8.2f} GB peak resident",
    ]
    lines += [f"{cost.copied_files:8} files with the checkpoint's digest"]
    lines += [f"{cost.compared_tensors:8} tensors compared byte for byte"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
