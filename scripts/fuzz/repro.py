"""A finding as one script that stands alone: the case, what writes it, what PEFT says of it, and the build."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULES = ("make", "oracle", "compare")
HEAD = '''"""{title}

Found by scripts/fuzz_checkpoints --seed {seed}, case {number}; shrunk in {tries} tries. PYTHONHASHSEED={hash_seed}.
{detail}

Run it in the project's environment and root: PYTHONPATH=. python {name}
It ends with 1 and says what differs while the fault is there, with 0 once it is gone.
"""

from __future__ import annotations

import json

CASE = json.loads(r"""
{case}
""")
'''
TAIL = '''

# --- the script ---

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time

LIMIT_SECONDS = {limit}
HASH_SEEDS = {hash_seeds}


def build(folder, hash_seed, out="bundle"):
    """Exit code and output of `python -m exporter build`."""
    root = os.environ.get("PROJECT_ROOT", os.getcwd())
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), root])
    (folder / "tmp").mkdir(exist_ok=True)
    environment = os.environ | {{"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": path, "TMPDIR": str(folder / "tmp")}}
    command = [sys.executable, "-m", "exporter", *build_arguments(CASE, out)]
    print("$", " ".join(["python", *command[1:]]))
    try:
        options = {{"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": LIMIT_SECONDS}}
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return None, f"no end after {{LIMIT_SECONDS}} s"
    return done.returncode, done.stdout + done.stderr


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "build.json")
    return {{str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}}


def left(folder):
    known = {{"base", "experts", "gate", "gate-truth", "tmp", "bundle", "saved", ".bundle.lock"}}
    beside = [path.name for path in folder.iterdir() if path.name not in known]
    foreign = (".ses", "torchinductor")
    return beside + [f"tmp/{{path.name}}" for path in (folder / "tmp").iterdir() if not path.name.startswith(foreign)]


def main():
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="repro-")))
    os.environ.setdefault("PROJECT_ROOT", os.getcwd())
    try:
        os.chdir(folder)
        write_checkpoint(CASE, folder)
        code, output = build(folder, HASH_SEEDS[0])
        print(output.strip()[-3000:])
        if code != 0:
            print("the build ended with", code)
            return 1
        if remains := left(folder):
            print("left behind:", remains)
            return 1
        if len(HASH_SEEDS) > 1:
            build(folder, HASH_SEEDS[1], "again")
            first, second = digests(folder / "bundle"), digests(folder / "again")
            if first != second:
                names = [name for name in first | second if first.get(name) != second.get(name)]
                print("bundles differ by PYTHONHASHSEED:", names)
                return 1
        differences = [] if {rounded} else compare_bundle(CASE, folder)["differences"]
        print("\\n".join(differences) or "equal")
        return 1 if differences else 0
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
'''


def write_repro(
    path: Path,
    case: Mapping[str, Any],
    outcome: Mapping[str, Any],
    tries: int,
    *,
    limit: float,
    other_seed: int | None = None,
) -> Path:
    """Write the script; returns its path."""
    from scripts.fuzz.judge import ROUNDED, case_dtype

    detail = outcome["detail"].replace("\\", "/").replace('"""', "'''")[-1500:]
    head = HEAD.format(
        title=f"{outcome['verdict']}: {case['base']['family']}, {case['purpose']}",
        seed=case["seed"], number=case["number"], tries=tries, hash_seed=case["hash_seed"], detail=detail,
        name=path.name,
        case=json.dumps(case, indent=1, ensure_ascii=True),
    )  # fmt: skip
    seeds = [case["hash_seed"], *([] if other_seed is None else [other_seed])]
    tail = TAIL.format(limit=limit, hash_seeds=seeds, rounded=case_dtype(case) in ROUNDED)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + "".join(_source(name) for name in MODULES) + tail, encoding="utf-8")
    return path


def _source(module: str) -> str:
    """A module of this package without its docstring, its `__future__` line and imports from this package."""
    text = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    text = re.sub(r'\A""".*?"""\n', "", text, flags=re.DOTALL)
    text = re.sub(r"^from __future__ .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^from scripts\.fuzz\.\w+ import (?:\([^)]*\)|.*)\n", "", text, flags=re.MULTILINE)
    return f"\n\n# --- {module} ---\n{text.strip()}\n"
