"""The kit that travels to a machine without a network: one xz stream in parts with digests. Standard library only."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InputError, MachineError

FORMAT_VERSION = 1
MANIFEST = "kit.json"
PART_BYTES = 40 << 20
SITE, LIBRARIES, MODELS = "site", "lib", "models"  # folders of an unpacked kit
BUNDLE, RECORDING, ON_ORT = "bundle", "recording.npz", "onnxruntime.txt"  # in each folder of MODELS
RTX_LIBRARY = "tensorrt_rtx_libs/libtensorrt_rtx.so.1"
# What the runtime and an engine build import; left out of the kit where the machine has it.
RUNTIME = (
    "numpy", "pydantic", "pydantic_core", "annotated-types", "typing_extensions", "typing-inspection", "tokenizers",
    "filelock",
)  # fmt: skip
TENSORRT = ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings", "cuda-bindings", "cuda-pathfinder")
PURE = ("tensorrt-rtx-cu13",)  # a source package on the index, of Python files only
GLIBCS = (39, 35, 34, 31, 28, 27, 24, 17)  # pip takes the platforms it is told, and no older ones by itself


@dataclass(frozen=True, slots=True)
class Part:
    """One file of the kit."""

    name: str
    size: int
    sha256: str


def pack(payload: Path, kit: Path, *, python: str, fast: bool = False, part_bytes: int = PART_BYTES) -> list[Part]:
    """Write all of `payload` into the new folder `kit`; nothing is left of it after an error."""
    if kit.exists():
        raise InputError("is there already", where=str(kit), need="a new folder for the kit")
    stage = kit.with_name(f"{kit.name}.part")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        parts = _Parts(stage, part_bytes)
        with (
            lzma.LZMAFile(parts, "w", filters=filters(fast=fast)) as stream,
            tarfile.open(fileobj=stream, mode="w|") as archive,
        ):
            archive.add(payload, ".", filter=_plain)
        parts.close()
        text = {"format_version": FORMAT_VERSION, "python": python, "parts": [asdict(part) for part in parts.done]}
        (stage / MANIFEST).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        stage.rename(kit)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return parts.done


def filters(*, fast: bool) -> list[dict[str, Any]]:
    """x86 code packs by a third better with its filter; the large window finds what one library repeats."""
    level = {"preset": 0} if fast else {"preset": 9 | lzma.PRESET_EXTREME, "dict_size": 256 << 20}
    return [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, **level}]


def unpack(kit: Path, folder: Path) -> None:
    """Check every part, then unpack into `folder`, which appears whole or not at all."""
    parts, python = read_manifest(kit)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python != here:
        fix = f"PYTHON=python{python} scripts/gpu_check, or pack again with --python {here}"
        raise MachineError("the kit is for another Python", where=str(kit), got=here, need=python, fix=fix)
    if problems := [problem for part in parts if (problem := _problem(kit, part))]:
        raise InputError(
            "the kit is damaged: " + "; ".join(problems), where=str(kit), fix="copy these files again", code="E_DIGEST"
        )
    stage = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        with (
            _joined([kit / part.name for part in parts]) as packed,
            lzma.LZMAFile(packed) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            # Python 3.11.2, which Debian 12 has, knows no filters; every part's digest has been checked.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(stage)
        _link_library(stage)
        stage.rename(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def kit_digest(kit: Path) -> str:
    """What tells one kit from another."""
    parts, _ = read_manifest(kit)
    return hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()[:16]


def read_manifest(kit: Path) -> tuple[list[Part], str]:
    """The parts that the kit's manifest lists, and the Python they are for."""
    try:
        text = json.loads((kit / MANIFEST).read_text(encoding="utf-8"))
        if text["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {text['format_version']}")
        python = str(text["python"])
        parts = [Part(str(part["name"]), int(part["size"]), str(part["sha256"])) for part in text["parts"]]
        if any(Path(part.name).name != part.name for part in parts):
            raise ValueError("a part outside the kit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("no kit", where=str(kit / MANIFEST), got=f"{type(error).__name__}: {error}") from error
    return parts, python


def _problem(kit: Path, part: Part) -> str | None:
    path = kit / part.name
    if not path.is_file():
        return f"{part.name} is missing"
    if path.stat().st_size != part.size:
        return f"{part.name} has {path.stat().st_size} bytes, need {part.size}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != part.sha256:
            return f"{part.name} has another sha256"
    return None


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The same bytes whoever packs; only files and folders travel."""
    if not (member.isfile() or member.isdir()):
        return None
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _link_library(folder: Path) -> None:
    """TensorRT for RTX opens its library without the version when a graph has a plugin; the wheel lacks that name."""
    library = folder / SITE / RTX_LIBRARY
    if library.is_file():
        (folder / LIBRARIES).mkdir(exist_ok=True)
        (folder / LIBRARIES / "libtensorrt_rtx.so").symlink_to(Path("..") / SITE / RTX_LIBRARY)


class _Parts(io.RawIOBase):
    """A stream to write that becomes files of at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        super().__init__()
        self.done: list[Part] = []
        self._folder, self._limit = folder, limit
        self._file: Any = None
        self._digest, self._size = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        rest = view
        while rest:
            if self._file is None:
                self._file = (self._folder / f"kit.{len(self.done):03d}").open("wb")
            piece = rest[: self._limit - self._size]
            self._file.write(piece)
            self._digest.update(piece)
            self._size += len(piece)
            rest = rest[len(piece) :]
            if self._size == self._limit:
                self._finish()
        return len(view)

    def close(self) -> None:
        if self._file is not None:
            self._finish()
        super().close()

    def _finish(self) -> None:
        self._file.close()
        self.done.append(Part(f"kit.{len(self.done):03d}", self._size, self._digest.hexdigest()))
        self._file, self._digest, self._size = None, hashlib.sha256(), 0


@contextmanager
def _joined(paths: Sequence[Path]) -> Iterator[Any]:
    """The parts as one stream to read."""

    class Joined(io.RawIOBase):
        def __init__(self) -> None:
            super().__init__()
            self.waiting = list(paths)
            self.file: Any = None

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while True:
                if self.file is None:
                    if not self.waiting:
                        return 0
                    self.file = self.waiting.pop(0).open("rb")
                if count := self.file.readinto(buffer):
                    return int(count)
                self.file.close()
                self.file = None

    with io.BufferedReader(Joined()) as stream:
        yield stream


def fetch_packages(
    site: Path, pins: dict[str, str], python: str, *, runtime: bool, tell: Callable[[str], None]
) -> None:
    """Download wheels for another Python on Linux x86-64 and unpack them into `site`; needs a package index."""
    wheels = site.with_name("wheels")
    wheels.mkdir(parents=True)
    platforms = [word for glibc in GLIBCS for word in ("--platform", f"manylinux_2_{glibc}_x86_64")]
    other = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    for name in (*TENSORRT, *(RUNTIME if runtime else ())):
        tell(f"downloading {name}")
        _pip("download", "--no-deps", *other, "--dest", str(wheels), pinned(name, pins))
    for name in PURE:
        _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), pinned(name, pins))
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)


def pinned(name: str, pins: dict[str, str]) -> str:
    """NAME==VERSION where constraints.txt pins it."""
    version = pins.get(name.lower().replace("_", "-"))
    return f"{name}=={version}" if version else name


def read_pins(path: Path) -> dict[str, str]:
    """Package -> version."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def _pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pip", *words, "--quiet"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise MachineError(f"pip {words[0]} {words[-1]} failed", got=lines[-1], need="a package index", code="E_KIT")
