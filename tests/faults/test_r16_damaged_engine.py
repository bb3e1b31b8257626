"""R16: a damaged or forged engine never reaches TensorRT."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import load
from runtime.backends.trt import TrtSession
from runtime.bundle import Bundle, open_bundle
from runtime.engines import Target, engines_root, open_engines
from runtime.errors import InputError, UserError
from runtime.model import engine_session
from runtime.session import SessionSettings
from tests.runtime.fake_tensorrt import FakeTensorrt


def session_of(bundle: Bundle) -> Any:
    return engine_session(bundle, bundle.graph("dynamic"), Target.TRT, SessionSettings(200))


def test_a_thousand_flipped_bytes_are_refused_before_tensorrt_is_called(built_copy: Path, trt: FakeTensorrt) -> None:
    opened = open_bundle(built_copy)
    [root] = engines_root(built_copy).iterdir()
    plan = root / "dynamic.plan"
    good, random = plan.read_bytes(), np.random.default_rng(16)
    for _ in range(1000):
        bad = bytearray(good)
        bad[random.integers(len(bad))] ^= int(random.integers(1, 256))
        plan.write_bytes(bad)
        with pytest.raises(InputError, match=r"changed|another content"):
            session_of(opened)
    assert trt.deserialised == 0
    assert not trt.driver.calls
    plan.write_bytes(good)
    session_of(opened).close()
    assert trt.deserialised == 1


def test_flipped_bytes_of_the_manifest_or_its_seal_are_refused(built_copy: Path, trt: FakeTensorrt) -> None:
    opened = open_bundle(built_copy)
    [root] = engines_root(built_copy).iterdir()
    random = np.random.default_rng(17)
    for name, _ in itertools.product(("manifest.json", "manifest.sha256"), range(100)):
        good = (root / name).read_bytes()
        bad = bytearray(good)
        bad[random.integers(len(bad))] ^= int(random.integers(1, 256))
        (root / name).write_bytes(bad)
        with pytest.raises(UserError, match="do not match"):
            session_of(opened)
        (root / name).write_bytes(good)
    assert trt.deserialised == 0


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing", "linked", "replaced after opening"])
def test_a_plan_that_is_not_the_listed_file_is_refused(
    damage: str, built_copy: Path, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    [root] = engines_root(built_copy).iterdir()
    plan = root / "dynamic.plan"
    good = plan.read_bytes()
    if damage == "replaced after opening":
        evil = good[:-1] + bytes([good[-1] ^ 1])

        def open_and_swap(*args: Any, **options: Any) -> Any:
            engines = open_engines(*args, **options)
            plan.write_bytes(evil)
            return engines

        monkeypatch.setattr("runtime.engines.open_engines", open_and_swap)
    elif damage in ("shorter", "longer"):
        plan.write_bytes(good[:-1] if damage == "shorter" else good + b"x")
    else:
        plan.rename(root.parent / "elsewhere.plan")
        if damage == "linked":
            plan.symlink_to(root.parent / "elsewhere.plan")
    with pytest.raises(UserError):
        load(built_copy, backend="trt")
    assert trt.deserialised == 0


def test_the_bytes_deserialised_are_those_that_were_hashed(built_copy: Path, trt: FakeTensorrt) -> None:
    """The file is read once: swapping it after that changes nothing."""
    [root] = engines_root(built_copy).iterdir()
    seen: list[bytes] = []
    original = TrtSession.__init__

    def spy(self: TrtSession, plan: bytes, *rest: Any, **more: Any) -> None:
        seen.append(plan)
        (root / "dynamic.plan").write_bytes(b"evil")
        original(self, plan, *rest, **more)

    good = (root / "dynamic.plan").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrtSession, "__init__", spy)
        load(built_copy, backend="trt").close()
    assert seen == [good]
