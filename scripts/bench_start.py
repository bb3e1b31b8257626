"""How long `runtime generate` takes from the start of its process to the first token, and what of it imports take.

python scripts/bench_start.py out/demo/dynamic --prompt "add 25+14="
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import quantiles
from time import perf_counter

IMPORTS = "import numpy, tokenizers, onnxruntime, runtime.cli, runtime.generate"


def main() -> None:
    """Print medians and quartiles of whole processes, in turn with those that only import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    generate = ["-m", "runtime", "generate", str(args.bundle), "--prompt", args.prompt, "--stream"]
    commands = {"to the first token": generate, "imports alone": ["-c", IMPORTS]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.runs):
        for name, words in commands.items():
            seconds[name].append(until_first_output([sys.executable, *words]))
    for name, times in seconds.items():
        low, median, high = quantiles(times, n=4)
        print(f"{name:20} {median:.2f} s   ({low:.2f} to {high:.2f}, {args.runs} runs)")


def until_first_output(command: list[str]) -> float:
    """Seconds from the start of the process to its first byte, or to its end where it prints nothing."""
    start = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = perf_counter() - start
        process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds


if __name__ == "__main__":
    main()
