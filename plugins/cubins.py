"""The compiled kernels: one archive in this package, read without Triton. Nothing is ever loaded from elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from plugins.launches import Constants, Launch

ARCHITECTURES = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0", "12.1")  # compute capabilities
FOLDER = Path(__file__).parent
ARCHIVE = FOLDER / "cubins.tar.xz"
INDEX = "index.json"
SOURCES = ("kernels.py", "launches.py", "compile.py")  # what the archive is made from


@dataclass(frozen=True, slots=True)
class Cubin:
    """One kernel for one dtype, one set of constants and one architecture."""

    kernel: str
    dtype: str
    constants: Constants
    architecture: str  # "8.7"
    shared: int  # bytes of shared memory
    data: bytes


@dataclass(frozen=True, slots=True)
class Cubins:
    """All of them, and what they were made from."""

    compiler: str
    sources: str  # digest
    cubins: tuple[Cubin, ...]

    def find(self, launch: Launch, architecture: str) -> Cubin:
        """The cubin of a launch; LookupError where there is none for this GPU."""
        wanted = (launch.kernel, launch.dtype, launch.constants, architecture)
        for cubin in self.cubins:
            if (cubin.kernel, cubin.dtype, cubin.constants, cubin.architecture) == wanted:
                return cubin
        raise LookupError(
            f"no kernel {launch.kernel} in {launch.dtype} for compute capability {architecture}; "
            f"there are {', '.join(ARCHITECTURES)} (bfloat16 from 8.0 on)"
        )


def has_dtype(architecture: str, dtype: str) -> bool:
    """Whether GPUs of this compute capability compute in this dtype."""
    return dtype != "bfloat16" or float(architecture) >= 8.0


@cache
def installed_cubins() -> Cubins:
    """Those of this package."""
    return read_cubins(ARCHIVE)


def sources_digest() -> str:
    """The digest of the files that the archive is made from, as they are now."""
    return hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()


def write_cubins(path: Path, cubins: Sequence[Cubin], compiler: str, sources: str) -> None:
    """Write the archive; equal cubins give equal bytes."""
    rows = [
        {"kernel": c.kernel, "dtype": c.dtype, "constants": dict(c.constants), "architecture": c.architecture,
         "shared": c.shared, "size": len(c.data)}
        for c in cubins
    ]  # fmt: skip
    index = json.dumps({"compiler": compiler, "sources": sources, "cubins": rows}, indent=1).encode()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in ((INDEX, index), ("cubins", b"".join(c.data for c in cubins))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path.write_bytes(lzma.compress(data.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def read_cubins(path: Path) -> Cubins:
    """Read the archive; a damaged one fails xz's own check (lzma.LZMAError, EOFError)."""
    with tarfile.open(path, mode="r:xz") as archive:
        contents = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        index_file, data_file = contents[INDEX], contents["cubins"]
        assert index_file is not None
        assert data_file is not None
        index, data = json.loads(index_file.read()), data_file.read()
    cubins, start = [], 0
    for row in index["cubins"]:
        part = data[start : start + row["size"]]
        start += row["size"]
        constants = tuple(row["constants"].items())
        cubins.append(Cubin(row["kernel"], row["dtype"], constants, row["architecture"], row["shared"], part))
    return Cubins(index["compiler"], index["sources"], tuple(cubins))
