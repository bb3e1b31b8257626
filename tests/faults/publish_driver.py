"""Builders as child processes, killed and raced: `python -m tests.faults.publish_driver TASK FOLDER COUNT`.

Prints JSON. A process of its own, with one thread, so that it may fork safely.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from exporter.publish import publish, stage
from runtime.bundle import Bundle, open_bundle
from runtime.errors import UserError
from runtime.sealed_folder import manifest_bytes
from tests.faults.failing_os import Counter, counted, kill_self
from tests.runtime.bundle_makers import artifacts_of, bundle_files, make_manifest, write_files

_FILES = {seed: bundle_files(seed, 0.01) for seed in range(16)}


def build(out: Path, seed: int, *, overwrite: bool = True) -> Bundle:
    """Publish the toy bundle of this seed."""
    with stage(out, overwrite=overwrite) as made:
        write_files(made.folder, _FILES[seed])
        return publish(made, make_manifest(), {"seed": seed})


def spawn(task: Callable[[], object]) -> int:
    """Run `task` in a forked child; its exit code is a UserError's, 0, or 99 for a bug."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        task()
        code = 0
    except UserError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def seed_of(out: Path) -> int | None:
    """Which seed's bundle lies at the target, whole and unmixed; None without a target. Raises if it is corrupt."""
    if not os.path.lexists(out):
        return None
    digest, text = open_bundle(out).digest, (out / "manifest.json").read_bytes()
    for seed, files in _FILES.items():
        if manifest_bytes(make_manifest(artifacts_of(files))) == text:
            return seed
    raise AssertionError(f"{digest} is nobody's bundle")


def kill_at_random(folder: Path, points: int) -> dict[str, int]:
    """kill -9 builders after a random time; each target must stay whole, the old one or the new one."""
    rng, out = random.Random(11), folder / "toy"
    start = time.perf_counter()
    build(out, 0)
    build(out, 0)
    longest = (time.perf_counter() - start) / 2 * 1.5
    result = {"points": points, "killed": 0, "old": 0, "new": 0}
    old = 0
    for point in range(points):
        new = 1 + point % 15
        pid = spawn(lambda seed=new: build(out, seed))  # type: ignore[misc]
        time.sleep(rng.uniform(0, longest))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        result["killed"] += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        found = seed_of(out)
        assert found in (old, new), (point, found)
        result["new" if found == new else "old"] += 1
        old = found
    return result | _aftermath(folder, out)


def kill_at_each_operation(folder: Path, limit: int, exchange: bool) -> dict[str, int]:
    """kill -9 the builder at its 1st, 2nd, … file operation until it gets through; at most `limit` points, spread."""
    out, total = folder / "toy", 0
    build(out, 0)
    with counted(Counter(0, kill_self), removals=True, exchange=exchange) as counter:
        build(out, 1)
    total = len(counter.names)
    result = {"points": 0, "killed": 0, "old": 0, "new": 0, "missing": 0}
    build(out, 0)
    for nth in range(1, total + 1, max(1, total // limit)):
        pid = spawn(lambda n=nth: _build_until(out, n, exchange))  # type: ignore[misc]
        result["killed"] += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        result["points"] += 1
        found = seed_of(out)
        assert found in (0, 1, None), found
        assert found is not None or not exchange, "with the kernel's exchange the target is never missing"
        result["missing" if found is None else ("old", "new")[found]] += 1
        with stage(out, overwrite=True):  # the next build brings a moved old bundle back
            assert seed_of(out) is not None
        build(out, 0)
    return result | _aftermath(folder, out)


def _build_until(out: Path, nth: int, exchange: bool) -> None:
    with counted(Counter(nth, kill_self), removals=True, exchange=exchange):
        build(out, 1)


def race(folder: Path, rounds: int) -> dict[str, int]:
    """8 builders of one target at once, 3 of them killed midway: one bundle, whole; losers wait and end with exit 3."""
    rng = random.Random(13)
    result = {"rounds": rounds, "winners": 0, "losers": 0, "killed": 0, "empty": 0}
    for number in range(rounds):
        out = folder / f"toy{number}"
        pids = [spawn(lambda o=out, s=seed: build(o, s, overwrite=False)) for seed in range(8)]  # type: ignore[misc]
        for pid in rng.sample(pids, 3):
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        codes = [os.waitstatus_to_exitcode(status) for status in statuses]
        assert set(codes) <= {0, 2, 3, -signal.SIGKILL}, codes
        assert codes.count(0) <= 1, codes
        winner = seed_of(out)
        assert winner is not None, codes
        assert codes[winner] in (0, -signal.SIGKILL), (codes, winner)  # it may be killed after its rename
        result["winners"] += codes.count(0)
        result["losers"] += codes.count(2) + codes.count(3)
        result["killed"] += codes.count(-signal.SIGKILL)
    return result | _aftermath(folder, folder / "toy0")


def _aftermath(folder: Path, out: Path) -> dict[str, int]:
    """The next build succeeds and clears what the killed ones left of its target."""
    build(out, 2)
    assert seed_of(out) == 2
    left = [name for name in os.listdir(folder) if name.startswith((f".{out.name}.stage-", f".{out.name}.trash-"))]
    return {"left": len(left)}


if __name__ == "__main__":
    name, where, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    tasks: dict[str, Callable[[], dict[str, int]]] = {
        "random": lambda: kill_at_random(where, number),
        "each": lambda: kill_at_each_operation(where, number, exchange=True),
        "each-without-exchange": lambda: kill_at_each_operation(where, number, exchange=False),
        "race": lambda: race(where, number),
    }
    print(json.dumps(tasks[name]()))
