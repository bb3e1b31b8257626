"""Compile the kernels ahead of time, for every dtype, constant and architecture: python -m plugins.compile OUT"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from plugins.cubins import ARCHITECTURES, Cubin, has_dtype, sources_digest, write_cubins
from plugins.launches import KERNELS, SCRATCH, WARPS, Kernel
from plugins.operators import DTYPES

TRITON_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
MAX_SHARED = 48 << 10  # more needs a function attribute on some devices


def main(argv: Sequence[str] | None = None) -> int:
    """Compile all and write the file."""
    parser = argparse.ArgumentParser(prog="python -m plugins.compile", description="Compile the kernels to cubins.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write, for use plugins/cubins.tar.xz")
    args = parser.parse_args(argv)
    cubins = compile_all()
    write_cubins(args.out, cubins, compiler_version(), sources_digest())
    sys.stdout.write(f"{len(cubins)} cubins, {args.out.stat().st_size} bytes\n")
    return 0


def compile_all() -> list[Cubin]:
    """Every cubin of the table, in its order."""
    with ProcessPoolExecutor() as pool:
        return list(pool.map(compile_one, *zip(*table(), strict=True), chunksize=8))


def table() -> Iterator[tuple[str, str, int, str]]:
    """(kernel, dtype, which of its constants, architecture)."""
    for kernel in KERNELS.values():
        for dtype in DTYPES:
            for variant in range(len(kernel.constants)):
                for architecture in ARCHITECTURES:
                    if has_dtype(architecture, dtype):
                        yield kernel.name, dtype, variant, architecture


def compile_one(name: str, dtype: str, variant: int, architecture: str) -> Cubin:
    """One cubin (triton.compile with an explicit target, which needs no GPU)."""
    import triton
    from triton.backends.compiler import GPUTarget

    triton.knobs.compilation.disable_line_info = True  # it holds paths of this machine
    kernel = KERNELS[name]
    target = GPUTarget("cuda", int(architecture.replace(".", "")), 32)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    compiled = triton.compile(_source(kernel, dtype, variant), target=target, options=options)
    shared = int(compiled.metadata.shared)
    if shared > MAX_SHARED or compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise RuntimeError(f"{name} for {architecture} needs {shared} bytes of shared memory, or scratch memory")
    if ptx_parameters(compiled.asm["ptx"]) != expected_parameters(kernel):
        raise RuntimeError(f"{name}: Triton compiled it with other parameters than `launches` has")
    return Cubin(name, dtype, kernel.constants[variant], architecture, shared, bytes(compiled.asm["cubin"]))


def ptx_parameters(ptx: str) -> list[str]:
    """The types of an entry's parameters, "u64" for a pointer."""
    head = ptx[ptx.index(".entry") :]
    return re.findall(r"\.param \.(\w+)", head[: head.index(")")])


def expected_parameters(kernel: Kernel) -> list[str]:
    """Those that `driver.Kernels` passes: the kernel's own, then Triton's scratch pointers."""
    types = {"i32": "u32", "fp32": "f32"}
    return [types.get(kind, "u64") for _, kind in kernel.parameters] + ["u64"] * SCRATCH


def _source(kernel: Kernel, dtype: str, variant: int) -> Any:
    from triton.compiler import ASTSource

    from plugins import kernels

    constants = dict(kernel.constants[variant])
    is_aligned = constants.pop("ALIGNED", 0)
    signature = {name: _type(kind, dtype) for name, kind in kernel.parameters} | dict.fromkeys(constants, "constexpr")
    multiples = [
        place
        for place, (name, kind) in enumerate(kernel.parameters)
        if is_aligned and (kind.endswith("*") or name in kernel.divisible)
    ]
    hints = {(place,): [["tt.divisibility", 16]] for place in multiples}
    return ASTSource(getattr(kernels, kernel.name), signature=signature, constexprs=constants, attrs=hints)


def _type(kind: str, dtype: str) -> str:
    return f"*{TRITON_NAMES[dtype]}" if kind == "T*" else f"*{kind[:-1]}" if kind.endswith("*") else kind


def compiler_version() -> str:
    """ "triton 3.9.0"."""
    import triton

    return f"triton {triton.__version__}"


if __name__ == "__main__":
    sys.exit(main())
