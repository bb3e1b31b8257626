"""The archive of compiled kernels: what the sources compile to, for every GPU that we name, and no more."""

from __future__ import annotations

import ast
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from plugins import compile as compiler
from plugins.cubins import ARCHITECTURES, ARCHIVE, FOLDER, Cubins, read_cubins, sources_digest, write_cubins
from plugins.launches import KERNELS, gate_launches, low_rank_launches
from plugins.operators import DTYPES, MAX_EXPERTS, GateRules
from tests.plugins.interpreter import ROOT, TRITON

RULES = GateRules(softmax=True, temperature=1.0, top_k=2, topk_softmax=True)


@pytest.fixture(scope="module")
def cubins() -> Cubins:
    return read_cubins(ARCHIVE)


def test_the_archive_is_of_these_sources(cubins: Cubins) -> None:
    assert cubins.sources == sources_digest(), "run scripts/kernels and commit plugins/cubins.tar.xz"
    assert cubins.compiler == f"triton {pinned('triton')}"


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


@pytest.mark.long
def test_the_sources_compile_to_the_archive(cubins: Cubins, tmp_path: Path) -> None:
    """Compiled anew, all of them: equal bytes."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TRITON}",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    out = tmp_path / "again.tar.xz"
    command = [sys.executable, "-P", "-m", "plugins.compile", out]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    again = read_cubins(out)
    assert [(c.kernel, c.dtype, c.constants, c.architecture) for c in again.cubins] == [
        (c.kernel, c.dtype, c.constants, c.architecture) for c in cubins.cubins
    ]
    assert all(ours.data == theirs.data for ours, theirs in zip(again.cubins, cubins.cubins, strict=True))
    assert again == cubins


SAMPLE = """
import sys, pickle
from plugins.compile import compile_one, table
rows = [row for row in table() if row[1] == "float16" and row[2] == 0 and row[3] == sys.argv[1]]
sys.stdout.buffer.write(pickle.dumps([compile_one(*row) for row in rows]))
"""


def test_a_sample_of_the_archive_is_compiled_anew(cubins: Cubins, tmp_path: Path) -> None:
    """Each kernel once; the long test compiles them all."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TRITON}", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", SAMPLE, "8.7"]
    run = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    again = pickle.loads(run.stdout)
    assert {cubin.kernel for cubin in again} == set(KERNELS)
    for cubin in again:
        [ours] = (
            each
            for each in cubins.cubins
            if (each.kernel, each.dtype, each.constants, each.architecture)
            == (cubin.kernel, cubin.dtype, cubin.constants, cubin.architecture)
        )
        assert ours == cubin


def test_every_launch_has_its_kernel(cubins: Cubins) -> None:
    """Every number of experts, few tokens and many, odd widths and even, on every GPU."""
    for dtype in DTYPES:
        launches = [
            *(launch for experts in range(1, MAX_EXPERTS + 1) for launch in gate_launches((3, experts), dtype, RULES)),
            *(
                launch
                for tokens in (1, 15, 16, 100)
                for width in (64, 65)
                for launch in low_rank_launches((tokens, width), 5, width, dtype)
            ),
        ]
        for architecture in ARCHITECTURES:
            if architecture == "7.5" and dtype == "bfloat16":
                with pytest.raises(LookupError, match=r"in bfloat16 for compute capability 7\.5"):
                    cubins.find(launches[0], architecture)
            else:
                assert all(cubins.find(launch, architecture).data[:4] == b"\x7fELF" for launch in launches)
    with pytest.raises(LookupError, match=r"no kernel gate_scalings in float32 for compute capability 5\.0"):
        cubins.find(launches[0].__class__("gate_scalings", "float32", (), (1, 1, 1), ()), "5.0")


def test_the_table_names_the_kernels_own_parameters() -> None:
    """Launches pass arguments by place: a parameter more or less in the source would shift them."""
    tree = ast.parse((FOLDER / "kernels.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for kernel in KERNELS.values():
        names = [argument.arg for argument in functions[kernel.name].args.args]
        constants = [name for name, _ in kernel.constants[0] if name != "ALIGNED"]
        assert names == [name for name, _ in kernel.parameters] + constants


def test_compiled_parameters_are_read_from_ptx() -> None:
    ptx = ".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_0,\n\t.param .f32 k_1\n)\n{ ld.param.b64 }"
    assert compiler.ptx_parameters(ptx) == ["u64", "f32"]
    assert compiler.expected_parameters(KERNELS["low_rank_down"]) == ["u64"] * 4 + ["u32"] * 2 + ["u64"] * 2


def test_no_path_of_the_machine_that_compiled(cubins: Cubins) -> None:
    for cubin in cubins.cubins:
        assert not any(word in cubin.data for word in (b"kernels.py", b"/home", b"/tmp", b"plugins")), cubin.kernel


def test_a_damaged_archive_is_refused(cubins: Cubins, tmp_path: Path) -> None:
    data = bytearray(ARCHIVE.read_bytes())
    for place in range(100, len(data), len(data) // 20):
        (tmp_path / "bad").write_bytes(bytes(data[:place]) + bytes([data[place] ^ 1]) + bytes(data[place + 1 :]))
        with pytest.raises((lzma.LZMAError, tarfile.TarError, EOFError)):
            read_cubins(tmp_path / "bad")
    write_cubins(tmp_path / "same", cubins.cubins, cubins.compiler, cubins.sources)
    assert read_cubins(tmp_path / "same") == cubins
