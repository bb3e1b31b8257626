"""Analyse the demo checkpoint's bundle on its held-out items: writes OUT/data.jsonl and the report's folder."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from demo_tasks import read_items

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    args = _parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data, bundle = args.out / "data.jsonl", args.out / "bundle"
    items = read_items(args.checkpoint / "heldout.jsonl")
    lines = [json.dumps({"prompt": item.prompt, "completion": item.answer}) for item in items]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    mix = ",".join(f"{folder.name}=0.25" for folder in sorted((args.checkpoint / "experts").iterdir()))
    build = ["--base", str(args.checkpoint / "base"), "--adapters", str(args.checkpoint / "xlora"), "--overwrite"]
    run_module("exporter", "build", *build, "--mode", "dynamic", "static", "--mix", mix, "--out", str(bundle))
    report = args.out / "report"
    run_module("exporter", "analyze", str(bundle), "--data", str(data), "--out", str(report), "--overwrite")
    return 0


def run_module(*words: str) -> None:
    """`python -m ...` as a person would type it; its failure is ours."""
    print("$ python -m", *words, flush=True)
    result = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=False)
    if result.returncode:
        sys.exit(result.returncode)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "four-tasks", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "analysis", metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
