"""The reader opens what is whole and refuses, by name and code, everything else."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from runtime.bundle import Bundle, open_bundle
from runtime.errors import InputError, MachineError, UserError
from runtime.manifest import Artifact
from runtime.safe_files import MAX_FILES
from tests.runtime.bundle_makers import artifacts_of, bundle_files, make_bundle, make_manifest, safetensors_bytes


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(make_bundle(tmp_path / "toy"))


def refusal(folder: Path, code: str, text: str, *, check_digests: bool = True) -> UserError:
    """The one error of opening `folder`; it must have this code and say this."""
    with pytest.raises(UserError, match=text) as caught:
        open_bundle(folder, check_digests=check_digests)
    assert caught.value.code == code
    return caught.value


def test_a_whole_bundle_opens(bundle: Bundle) -> None:
    assert bundle.digest == hashlib.sha256((bundle.root / "manifest.json").read_bytes()).hexdigest()
    assert bundle.file("dynamic.onnx") == bundle.root / "dynamic.onnx"
    assert bundle.file(bundle.artifacts("tokenizer")[0]) == bundle.root / "tokenizer/tokenizer.json"
    assert bundle.read("dynamic.onnx") == bundle_files()["dynamic.onnx"]
    assert [file.path for file in bundle.artifacts("weights")] == [
        "weights/base.safetensors",
        "weights/static.safetensors",
    ]


def test_sha256sum_can_check_the_seal(bundle: Bundle) -> None:
    digest, name = (bundle.root / "manifest.sha256").read_text().split()
    assert (name, digest) == ("manifest.json", bundle.digest)


def test_a_bundle_without_a_build_log_opens(bundle: Bundle) -> None:
    (bundle.root / "build.json").unlink()
    assert open_bundle(bundle.root).digest == bundle.digest


def test_the_build_log_is_not_part_of_the_identity(bundle: Bundle) -> None:
    (bundle.root / "build.json").write_text("not even JSON")
    assert open_bundle(bundle.root).digest == bundle.digest


def test_the_way_to_a_bundle_may_be_a_link(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("toy")
    assert open_bundle(tmp_path / "current").root == bundle.root


def test_graphs_are_found_by_name_and_the_first_by_default(bundle: Bundle) -> None:
    assert bundle.graph().name == "dynamic"
    assert bundle.graph("static").mix == {"math": 0.7, "code": 0.3}
    with pytest.raises(InputError, match="no graph 'other'; need one of dynamic, static"):
        bundle.graph("other")


@pytest.mark.parametrize("name", ["manifest.json", "build.json", "../secret", "/etc/passwd", "weights", ""])
def test_only_listed_files_are_handed_out(bundle: Bundle, name: str) -> None:
    with pytest.raises(InputError, match="lists no file") as caught:
        bundle.file(name)
    assert caught.value.code == "E_UNLISTED"
    with pytest.raises(InputError, match="lists no file"):
        bundle.read(name)


def test_a_file_changed_after_opening_is_not_handed_out(bundle: Bundle) -> None:
    data = bundle.read("dynamic.onnx")
    os.replace(bundle.root / "static.onnx", bundle.root / "dynamic.onnx")
    for give in (bundle.file, bundle.read):
        with pytest.raises(InputError, match=r"changed after its folder was opened|too large") as caught:
            give("dynamic.onnx")
        assert caught.value.code == "E_DIGEST"
    (bundle.root / "dynamic.onnx").write_bytes(data + b"more")
    with pytest.raises(InputError, match="too large"):
        bundle.read("dynamic.onnx")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text("x"), "is a file; a bundle is a folder"),
        (lambda path: path.mkdir(), "holds no manifest.json"),
        (lambda path: path.symlink_to(path), "no such folder"),
    ],
)
def test_what_is_no_bundle_is_called_so(tmp_path: Path, make: object, text: str) -> None:
    make(tmp_path / "x")  # type: ignore[operator]
    refusal(tmp_path / "x", "E_BUNDLE", text)


def test_a_nul_in_the_path_is_bad_input_not_a_crash() -> None:
    refusal(Path("a\0b"), "E_BUNDLE", "no such folder")


def test_a_folder_that_may_not_be_looked_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *, strict: bool) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "resolve", refuse)
    refusal(tmp_path, "E_BUNDLE", "no permission to look into it")


def test_a_bundle_that_was_removed_is_no_crash(bundle: Bundle, tmp_path: Path) -> None:
    bundle.root.rename(tmp_path / "elsewhere")
    for give in (bundle.file, bundle.read):
        with pytest.raises(MachineError, match="cannot open the folder: No such file or directory") as caught:
            give("dynamic.onnx")
        assert caught.value.code == "E_READ"


def test_a_missing_file_is_named(bundle: Bundle) -> None:
    (bundle.root / "golden/golden.json").unlink()
    refusal(bundle.root, "E_MISSING", "golden/golden.json: the file is missing")


def test_a_missing_seal_is_named(bundle: Bundle) -> None:
    (bundle.root / "manifest.sha256").unlink()
    refusal(bundle.root, "E_MISSING", r"manifest\.sha256: the file is missing")


def test_a_seal_of_another_manifest_is_refused(bundle: Bundle) -> None:
    (bundle.root / "manifest.sha256").write_text(f"{'0' * 64}  manifest.json\n")
    refusal(bundle.root, "E_DIGEST", r"manifest\.json and manifest\.sha256 do not match", check_digests=False)


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "weights/more.safetensors", "tokenizer/evil.py", "a\nb"])
def test_an_unlisted_file_is_refused(bundle: Bundle, name: str) -> None:
    (bundle.root / name).write_text("x")
    refusal(bundle.root, "E_UNLISTED", "the manifest lists no such file", check_digests=False)


@pytest.mark.parametrize("name", ["empty", ".git", "weights/deeper"])
def test_an_unlisted_folder_is_refused_even_when_empty(bundle: Bundle, name: str) -> None:
    (bundle.root / name).mkdir()
    refusal(bundle.root, "E_UNLISTED", "the manifest lists no such folder")


def test_another_size_is_refused_without_reading(bundle: Bundle) -> None:
    with (bundle.root / "dynamic.onnx").open("ab") as file:
        file.write(b"x")
    refusal(bundle.root, "E_DIGEST", "another size; got 2015 bytes; need 2014", check_digests=False)


def test_another_content_is_refused(bundle: Bundle) -> None:
    path = bundle.root / "weights/base.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    error = refusal(bundle.root, "E_DIGEST", "another content than the manifest says")
    assert "weights/base.safetensors" in str(error)
    assert open_bundle(bundle.root, check_digests=False).digest == bundle.digest


def test_all_bad_files_are_reported_at_once(bundle: Bundle) -> None:
    for path in ("dynamic.onnx", "static.onnx", "golden/golden.json"):
        data = bytearray((bundle.root / path).read_bytes())
        data[5] ^= 8
        (bundle.root / path).write_bytes(data)
    error = refusal(bundle.root, "E_DIGEST", "3 problems")
    assert all(path in str(error) for path in ("dynamic.onnx", "static.onnx", "golden/golden.json"))


def test_too_large_a_build_log_is_refused(bundle: Bundle) -> None:
    os.truncate(bundle.root / "build.json", (16 << 20) + 1)
    refusal(bundle.root, "E_LIMIT", "the build log is too large")


def test_too_many_entries_are_refused(bundle: Bundle) -> None:
    for number in range(2 * MAX_FILES):
        (bundle.root / f"x{number}").touch()
    refusal(bundle.root, "E_LIMIT", "the folder holds too many entries; need at most 512 files")


def test_an_unreadable_file_is_the_machines_fault(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "readv", fail)
    with pytest.raises(MachineError, match="cannot read: Input/output error") as caught:
        open_bundle(bundle.root)
    assert (caught.value.code, caught.value.exit_code) == ("E_READ", 3)


def test_a_file_that_changes_while_it_is_read_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    readv = os.readv

    def touch_and_read(fd: int, buffers: list[memoryview]) -> int:
        os.utime(fd)
        return readv(fd, buffers)

    monkeypatch.setattr(os, "readv", touch_and_read)
    refusal(bundle.root, "E_DIGEST", "the file changed while it was read")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "header claims 0 bytes"),
        (b"\xff" * 20, r"header claims \d+ bytes"),
        ((9 << 20).to_bytes(8, "little") + b" " * (9 << 20), r"header claims 9437184 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "not an object"),
        ((2).to_bytes(8, "little") + b"{]", "is not JSON"),
        ((9).to_bytes(8, "little") + b'{"a":[1]}', "wrong at 'a'"),
        (safetensors_bytes({})[:-2] + b"  ", "is not JSON"),
    ],
)
def test_unsound_weights_are_refused_whatever_their_digest(tmp_path: Path, data: bytes, text: str) -> None:
    files = bundle_files() | {"weights/base.safetensors": data}
    refusal(make_bundle(tmp_path / "x", files), "E_WEIGHTS", text)
    refusal(tmp_path / "x", "E_WEIGHTS", text, check_digests=False)


def _weights(*spans: tuple[str, str, list[int], int, int], size: int) -> bytes:
    entries = ",".join(f'"{n}":{{"dtype":"{d}","shape":{s},"data_offsets":[{b},{e}]}}' for n, d, s, b, e in spans)
    head = f"{{{entries}}}".encode()
    return len(head).to_bytes(8, "little") + head + b"\0" * size


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (_weights(("a", "F32", [2], 0, 8), size=9), "the tensors hold 8 bytes, the file 9"),
        (_weights(("a", "F32", [2], 4, 12), size=12), "begins at byte 4, the one before it ends at 0"),
        (_weights(("a", "F32", [2], 0, 8), ("b", "F32", [2], 4, 12), size=12), "begins at byte 4, the one before it"),
        (_weights(("a", "F32", [3], 0, 8), size=8), "wrong at 'a'"),
        (_weights(("a", "F32", [-1, -2], 0, 8), size=8), "wrong at 'a'"),
        (_weights(("a", "X99", [2], 0, 8), size=8), "wrong at 'a'"),
        (_weights(("a", "U8", [0], 0, 0), ("a", "U8", [1], 0, 1), size=1), "has the key 'a' twice"),
    ],
)
def test_tensors_must_cover_the_weights_file(tmp_path: Path, data: bytes, text: str) -> None:
    refusal(make_bundle(tmp_path / "x", bundle_files() | {"weights/base.safetensors": data}), "E_WEIGHTS", text)


def test_the_same_content_has_the_same_digest_anywhere(tmp_path: Path) -> None:
    one, other = (open_bundle(make_bundle(tmp_path / name)).digest for name in ("a", "b"))
    assert one == other
    assert open_bundle(make_bundle(tmp_path / "c", bundle_files(seed=1))).digest != one


def test_a_manifest_entry_knows_its_file() -> None:
    listed = make_manifest(artifacts_of(bundle_files())).artifacts
    assert isinstance(listed[0], Artifact)
    assert [file.path for file in listed] == sorted(bundle_files())
