"""One case from its folders to a verdict: written, built, run, compared, and what was left behind."""

from __future__ import annotations

import gc
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from scripts.fuzz.compare import compare_bundle
from scripts.fuzz.make import build_arguments, write_checkpoint
from scripts.fuzz.oracle import Oracle
from scripts.fuzz.refusals import known_reason

BUNDLE = "bundle"
# docs/bundle.md: the lock's empty file stays.
KEPT = frozenset({"base", "experts", "gate", "gate-truth", "output.txt", "tmp", BUNDLE, "saved", f".{BUNDLE}.lock"})
NOT_OURS = (".ses", "torchinductor")  # ONNX Runtime's and torch's own, in the place for temporary files
SHARED_MEMORY = Path("/dev/shm")
ROUNDED = ("float16", "bfloat16")


class Verdict(StrEnum):
    """How a case ended. Those of FINDINGS are findings."""

    EQUAL = "equal"
    UNCOMPARED = "built, numbers not compared"  # float16 and bfloat16: this CPU gives no answer
    REFUSED = "refused, known"
    BOTH_REFUSE = "refused, and PEFT fails as well"
    UNMADE = "PEFT cannot make it"
    DIFFERS = "differs"
    CRASHED = "crashed"
    HUNG = "hung"
    DIED = "died"
    LEFT_FILES = "left files"
    UNKNOWN_REFUSAL = "refused without a known reason"
    UNSTABLE = "bundles differ by PYTHONHASHSEED"
    FUZZER = "the fuzzer failed"


FINDINGS = frozenset(
    {
        Verdict.DIFFERS, Verdict.CRASHED, Verdict.HUNG, Verdict.DIED, Verdict.LEFT_FILES, Verdict.UNKNOWN_REFUSAL,
        Verdict.UNSTABLE,
        Verdict.FUZZER,
    }
)  # fmt: skip


def judge(case: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The verdict, its detail, seconds by part and what was compared; the case's folder stays."""
    clock = Clock()
    outcome: dict[str, Any] = {"verdict": Verdict.EQUAL, "detail": "", "seconds": clock.seconds}
    folder.mkdir(parents=True)
    with private_places(folder), written_to(folder / "output.txt"):
        try:
            with clock("make"):
                write_checkpoint(case, folder)
        except Exception as error:  # noqa: BLE001 - PEFT and transformers raise anything
            return outcome | {"verdict": Verdict.UNMADE, "detail": one_line(error)}
        shared = in_shared_memory()
        with clock("build"):
            code, message = build(case)
        leftovers = left_behind(folder, shared, has_bundle=code == 0)
        if code != 0:
            with clock("compare"):
                outcome |= judge_refusal(case, folder, code, message)
        elif case_dtype(case) in ROUNDED:
            outcome["verdict"] = Verdict.UNCOMPARED
        else:
            with clock("compare"):
                outcome |= judge_bundle(case, folder)
            leftovers = leftovers or left_behind(folder, shared, has_bundle=True)
    if leftovers and outcome["verdict"] not in FINDINGS:
        outcome |= {"verdict": Verdict.LEFT_FILES, "detail": ", ".join(leftovers)}
    gc.collect()
    return outcome


def case_dtype(case: Mapping[str, Any]) -> str:
    """The build's."""
    words = case["build"]["arguments"]
    return words[words.index("--dtype") + 1] if "--dtype" in words else "float32"


def build(case: Mapping[str, Any], out: str = BUNDLE) -> tuple[int, str]:
    """Exit code and message of the build, in this process: by the command line's `main`, or by `build` from Python."""
    from exporter.cli import main, parser
    from exporter.commands.build import _build_spec

    arguments = build_arguments(case, out)
    if case["via"] == "cli":
        before = Path("output.txt").stat().st_size
        try:
            code = main(arguments)
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        return code, Path("output.txt").read_text(errors="replace")[before:].strip().removeprefix("error: ")
    from exporter import build as build_bundle
    from runtime.errors import UserError

    try:
        build_bundle(_build_spec(parser().parse_args(arguments)))
    except UserError as error:
        return error.exit_code, str(error)
    except SystemExit as error:
        return int(error.code or 0), "the command line was refused"
    except Exception:  # noqa: BLE001 - whatever it is, it is a defect
        return 4, traceback.format_exc()
    return 0, ""


def judge_refusal(case: Mapping[str, Any], folder: Path, code: int, message: str) -> dict[str, Any]:
    """A defect; or a refusal, which is meant, or needless."""
    if code != 2:
        return {"verdict": Verdict.CRASHED, "detail": f"exit {code}: {message}"}
    if "the exported graph is not the model" in message:
        return {"verdict": Verdict.DIFFERS, "detail": f"the build's own verification: {message}"}
    reason = known_reason(message)
    if reason is not None:
        return {"verdict": Verdict.REFUSED, "detail": message, "reason": reason}
    problem = peft_problem(case, folder)
    if problem:
        return {"verdict": Verdict.BOTH_REFUSE, "detail": f"{message} | PEFT: {problem}"}
    return {"verdict": Verdict.UNKNOWN_REFUSAL, "detail": message}


def peft_problem(case: Mapping[str, Any], folder: Path) -> str:
    """Why PEFT does not run the model of the case's first rows; empty: it does."""
    oracle = Oracle(case, folder)
    oracle.is_saved = lambda way: False  # type: ignore[method-assign]  # nothing was saved
    try:
        for run in case["runs"]:
            for row in run["rows"]:
                oracle.logits(row, row["prompt"])
    except Exception as error:  # noqa: BLE001
        return one_line(error)
    return ""


def judge_bundle(case: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the bundle says against what PEFT says. Where PEFT cannot run the model there is nothing to compare."""
    from runtime.errors import UserError

    try:
        found = compare_bundle(case, folder)
    except UserError as error:
        return {"verdict": Verdict.CRASHED, "detail": f"the runtime refuses its own bundle: {one_line(error)}"}
    except Exception as error:  # noqa: BLE001
        problem = peft_problem(case, folder)
        if problem:
            return {"verdict": Verdict.UNMADE, "detail": f"PEFT: {problem}"}
        return {"verdict": Verdict.CRASHED, "detail": f"{one_line(error)}\n{traceback.format_exc()}"}
    counts = {key: found[key] for key in ("tokens", "ties", "worst", "noisy", "unfolded", "ungenerated")}
    if found["differences"]:
        return {"verdict": Verdict.DIFFERS, "detail": "\n".join(found["differences"]), "counts": counts}
    return {"counts": counts}


# --- what is left behind ---


@contextmanager
def private_places(folder: Path) -> Iterator[None]:
    """The case's own working folder and its own place for temporary files."""
    before, places = Path.cwd(), dict(os.environ)
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"] = str(folder / "tmp")
    tempfile.tempdir = None
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(places)
        tempfile.tempdir = None


def in_shared_memory() -> frozenset[str]:
    """What lies in shared memory now, of this process or of this project."""
    names = os.listdir(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else []
    return frozenset(name for name in names if str(os.getpid()) in name or "xlora" in name)


def left_behind(folder: Path, shared: frozenset[str], *, has_bundle: bool) -> list[str]:
    """Files of the build that should be gone: beside the bundle, temporary, or in shared memory."""
    kept = KEPT if has_bundle else KEPT - {BUNDLE, "saved"}
    beside = [path.name for path in folder.iterdir() if path.name not in kept]
    temporary = [f"tmp/{path.name}" for path in (folder / "tmp").iterdir() if not path.name.startswith(NOT_OURS)]
    return sorted(beside) + sorted(temporary) + sorted(f"/dev/shm/{name}" for name in in_shared_memory() - shared)


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Standard output and error of this process, and of what it calls in C, go to a file."""
    import sys

    path.touch()
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(2), "w", buffering=1)
    try:
        yield
    finally:
        sys.stdout.close(), sys.stderr.close()
        sys.stdout, sys.stderr = before
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


class Clock:
    """Seconds by the name of a part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - began, 3)


# --- what two findings have in common ---


def one_line(error: BaseException) -> str:
    """Type and message, short."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def signature(outcome: Mapping[str, Any]) -> str:
    """What stays of a finding when the case shrinks: its verdict and the words of its message, without numbers."""
    verdict, detail = outcome["verdict"], outcome["detail"]
    if verdict in (Verdict.HUNG, Verdict.DIED, Verdict.UNSTABLE):
        return str(verdict)
    if verdict == Verdict.DIFFERS:
        kind = "verification" if "own verification" in detail else "ids" if detail.startswith("text ") else "numbers"
        kind = "generation_config.json" if "under generation_config" in detail else kind
        return f"{verdict}: {kind}"
    if verdict == Verdict.CRASHED:
        lines = [line for line in detail.splitlines() if line.strip()]
        return f"{verdict}: {_plain(lines[-1] if 'Traceback' in detail else lines[0])}"
    return f"{verdict}: {_plain(detail)}"


def _plain(text: str) -> str:
    text = re.sub(r"/\S+", "PATH", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "_", text)
    text = re.sub(r"\b(?:expert:)?(?:math|code|prose|law|late)\b|\S*\w\.\w\S*|\b\w*_\w*\b", "_", text)
    return re.sub(r"[-+]?\d[\d.e+-]*", "#", text)[:160]


def drop(folder: Path) -> None:
    """Delete a case's folder."""
    shutil.rmtree(folder, ignore_errors=True)


Judge = Callable[[Mapping[str, Any], Path], dict[str, Any]]
