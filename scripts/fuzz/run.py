"""The loop: draw, ask a worker, shrink what is found, write the log. `scripts/fuzz_checkpoints` is this module."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.fuzz import log
from scripts.fuzz.draw import CASES_A_HASH_SEED, Case, draw_case, hash_seed_of
from scripts.fuzz.judge import FINDINGS, Verdict, signature
from scripts.fuzz.repro import write_repro
from scripts.fuzz.shrink import shrink
from scripts.fuzz.workers import COMMAND, Worker

HANG_SECONDS = 60.0
SHRINK_SECONDS, SHRINK_TRIES = 90.0, 80


@dataclass(slots=True)
class Settings:
    """Of one run."""

    seed: int
    out: Path
    minutes: float | None = None
    cases: int | None = None
    jobs: int = 1
    first: int = 0
    hang_seconds: float = HANG_SECONDS
    shrink_seconds: float = SHRINK_SECONDS
    keep: bool = False
    command: Sequence[str] = COMMAND


@dataclass(slots=True)
class Shared:
    """What the threads of a run share, under its lock."""

    settings: Settings
    began: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    next_block: int = 0
    lines: list[log.Line] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)  # signature of a finding -> the case that showed it first

    def block(self) -> range | None:
        """The next cases that share a hash seed; None at the end."""
        with self.lock:
            first = self.settings.first + self.next_block * CASES_A_HASH_SEED
            end = first + CASES_A_HASH_SEED
            if self.settings.cases is not None:
                end = min(end, self.settings.first + self.settings.cases)
            if first >= end or self.is_over():
                return None
            self.next_block += 1
            return range(first, end)

    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.settings.minutes is not None and time.monotonic() - self.began > 60 * self.settings.minutes

    def put(self, line: log.Line) -> None:
        """Keep a line, and say it where it is a finding."""
        with self.lock:
            self.lines.append(line)
            log.append(self.settings.out / "log.jsonl", line)
            if line["verdict"] in FINDINGS:
                print(
                    f"case {line['number']} {line['family']}: {line['verdict']}: {line['detail'][:300]} "
                    f"-> {line['repro']}",
                    flush=True,
                )

    def first_of(self, sign: str, number: int) -> int:
        """The first case with this finding."""
        with self.lock:
            return self.seen.setdefault(sign, number)


def run(settings: Settings) -> list[log.Line]:
    """Judge cases until the time or their number is up; returns the log's lines."""
    settings.out.mkdir(parents=True, exist_ok=True)
    shared = Shared(settings, time.monotonic())
    threads = [threading.Thread(target=_job, args=(shared, job)) for job in range(settings.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return shared.lines


def _job(shared: Shared, job: int) -> None:
    """Blocks of cases, each in a process of its own; what is to be built twice is built again in the next one's."""
    again: list[tuple[Case, Path, dict[str, str]]] = []
    while (block := shared.block()) is not None:
        seed = hash_seed_of(shared.settings.seed, block[0])
        worker = Worker(seed, shared.settings.command)
        try:
            again = _twins(shared, worker, again)
            for number in block:
                if shared.is_over():
                    break
                again += _case(shared, worker, draw_case(shared.settings.seed, number))
        finally:
            worker.close()
    if again:
        worker = Worker(hash_seed_of(shared.settings.seed, 10_000_000 + job), shared.settings.command)
        _twins(shared, worker, again)
        worker.close()


def _case(shared: Shared, worker: Worker, case: Case) -> list[tuple[Case, Path, dict[str, str]]]:
    """Judge one case and log it; returns it where it is to be built a second time."""
    folder = shared.settings.out / "cases" / f"{case['seed']}-{case['number']}"
    outcome = judged(worker, case, folder, shared.settings.hang_seconds)
    if outcome["verdict"] in FINDINGS:
        _look_closer(shared, worker, case, outcome)
    shared.put(log.line_of(case, outcome, worker.hash_seed))
    if "digests" in outcome and outcome["verdict"] not in FINDINGS:
        return [(case, folder, outcome["digests"])]
    if not shared.settings.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return []


def judged(worker: Worker, case: Case, folder: Path, seconds: float) -> dict[str, Any]:
    """The worker's verdict; what hung is asked again with twice the time, for a busy machine is no hang."""
    for limit in (seconds, 2 * seconds):
        shutil.rmtree(folder, ignore_errors=True)
        outcome = worker.ask({"task": "case", "case": case, "folder": str(folder)}, limit)
        if outcome["verdict"] != Verdict.HUNG:
            break
    return outcome


def _look_closer(shared: Shared, worker: Worker, case: Case, outcome: dict[str, Any]) -> None:
    """Shrink the first case of a finding and write its repro; later ones of the same point to it."""
    settings, sign = shared.settings, signature(outcome)
    is_number = sign == f"{Verdict.DIFFERS}: numbers"  # says nothing of its cause: each family's is looked at
    first = shared.first_of(f"{sign}/{case['base']['family']}" if is_number else sign, case["number"])
    if first != case["number"]:
        outcome["twin_of"] = first
        return
    folder = settings.out / "cases" / f"{case['seed']}-{case['number']}-smaller"
    seen: dict[str, Any] = dict(outcome)

    def shows(smaller: Case) -> bool:
        found = worker.ask({"task": "case", "case": smaller, "folder": str(folder)}, settings.hang_seconds)
        shutil.rmtree(folder, ignore_errors=True)
        if found["verdict"] in FINDINGS and signature(found) == sign:
            seen.update(found)
            return True
        return False

    small, tries = shrink(case, shows, settings.shrink_seconds, SHRINK_TRIES)
    path = settings.out / f"finding-{case['seed']}-{case['number']}.py"
    write_repro(path, small, seen, tries, limit=2 * settings.hang_seconds)
    path.with_suffix(".json").write_text(json.dumps({"case": case, "small": small, "outcome": seen}, indent=1))
    outcome["repro"] = str(path)
    outcome["detail"] = f"{outcome['detail']}\nshrunk: {seen['detail']}"


def _twins(
    shared: Shared, worker: Worker, again: list[tuple[Case, Path, dict[str, str]]]
) -> list[tuple[Case, Path, dict[str, str]]]:
    """Build once more under another hash seed; other bytes are a finding."""
    for case, folder, digests in again:
        task = {"task": "digests", "case": case, "folder": str(folder)}
        reply = worker.ask(task, 2 * shared.settings.hang_seconds)
        second = reply.get("digests", digests)
        other = sorted(name for name in digests | second if digests.get(name) != second.get(name))
        outcome: dict[str, Any] = {"verdict": "equal under two hash seeds", "detail": "", "seconds": {}}
        outcome |= {} if "digests" in reply else reply
        if other:
            outcome |= {
                "verdict": Verdict.UNSTABLE,
                "detail": f"{', '.join(other[:8])} (seeds {case['hash_seed']}, {worker.hash_seed})",
            }
            if shared.first_of(str(Verdict.UNSTABLE), case["number"]) == case["number"]:
                path = shared.settings.out / f"finding-{case['seed']}-{case['number']}-twice.py"
                limit = 2 * shared.settings.hang_seconds
                outcome["repro"] = str(write_repro(path, case, outcome, 0, limit=limit, other_seed=worker.hash_seed))
        shared.put(log.line_of(case, outcome, worker.hash_seed))
        if not shared.settings.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """0 nothing found, 1 findings."""
    settings, table = read_settings(argv)
    began = time.monotonic()
    lines = run(settings)
    minutes = (time.monotonic() - began) / 60
    text = log.summary(lines, minutes, settings.jobs)
    (settings.out / "summary.md").write_text(text, encoding="utf-8")
    if table is not None:
        table.write_text(f"# A run of the fuzzer\n\n{text}", encoding="utf-8")
    print(text)
    return int(any(line["verdict"] in FINDINGS for line in lines))


def read_settings(argv: Sequence[str] | None) -> tuple[Settings, Path | None]:
    """What the command line says, and where the table is to be written besides."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz_checkpoints", description=__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--minutes", type=float, help="stop after so long (shrinking what was found last may take longer)")
    add("--cases", type=int, help="or after so many cases")
    add("--seed", type=int, required=True, help="a case is determined by this and its number")
    add("--first", type=int, default=0, help="the first case's number (a multiple of 32 keeps its hash seed)")
    add("--jobs", type=int, default=2, help="worker processes (default 2)")
    add("--out", type=Path, default=Path("out/fuzz"), help="log.jsonl, summary.md and the repros (default out/fuzz)")
    add("--log", type=Path, help="write the summary here too, as a page")
    add("--hang", type=float, default=HANG_SECONDS, help="seconds after which a case hangs (default 60)")
    add("--shrink", type=float, default=SHRINK_SECONDS, help="seconds to shrink a finding (default 90)")
    add("--keep", action="store_true", help="keep the cases' folders")
    args = parser.parse_args(argv)
    if args.minutes is None and args.cases is None:
        parser.error("needs --minutes or --cases")
    settings = Settings(
        args.seed, args.out.resolve(), args.minutes, args.cases, args.jobs, args.first, args.hang, args.shrink,
        args.keep,
    )  # fmt: skip
    return settings, args.log


if __name__ == "__main__":
    sys.exit(main())
