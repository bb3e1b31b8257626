"""Stages and publishing: what appears, what is refused, what is left behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

from exporter import publish as publishing
from exporter.errors import ExportError
from exporter.publish import Stage, holds_only_a_bundle, publish, stage
from runtime.bundle import Bundle, open_bundle
from runtime.errors import InputError, MachineError, UserError
from tests.runtime.bundle_makers import bundle_files, make_bundle, make_manifest, write_files


def put(out: Path, seed: int = 0, *, overwrite: bool = False) -> Bundle:
    """Publish a toy bundle the whole way."""
    with stage(out, overwrite=overwrite) as made:
        write_files(made.folder, bundle_files(seed))
        return publish(made, make_manifest(), {"seconds": 1.5, "log": Path("x")})


def put_with(out: Path, spoil: Callable[[Path], object], *, overwrite: bool = False) -> Bundle:
    """Publish a toy bundle after something was done to its stage."""
    with stage(out, overwrite=overwrite) as made:
        write_files(made.folder, bundle_files())
        spoil(made.folder)
        return publish(made, make_manifest())


def failing(error: BaseException) -> Callable[[Path], object]:
    """Something that raises in the middle of a build."""

    def fail(folder: Path) -> None:
        raise error

    return fail


def put_file(path: Path) -> None:
    if path.is_dir():  # a file in a folder's place
        shutil.rmtree(path)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")


def leftovers(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if ".stage-" in name or ".trash-" in name)


def refusal(out: Path, code: str, text: str, *, overwrite: bool = False) -> UserError:
    with pytest.raises(UserError, match=text) as caught, stage(out, overwrite=overwrite):
        pytest.fail("the stage must not open")
    assert caught.value.code == code
    assert leftovers(out.parent) == []
    return caught.value


def test_a_published_bundle_is_the_one_a_reader_opens(tmp_path: Path) -> None:
    bundle = put(tmp_path / "toy")
    assert bundle.root == tmp_path / "toy"
    assert open_bundle(tmp_path / "toy").digest == bundle.digest
    assert bundle.digest == open_bundle(make_bundle(tmp_path / "by-hand")).digest
    assert json.loads((tmp_path / "toy/build.json").read_text()) == {"seconds": 1.5, "log": "x"}
    assert sorted(os.listdir(tmp_path)) == [".toy.lock", "by-hand", "toy"]


def test_kinds_follow_from_the_layout(tmp_path: Path) -> None:
    kinds = {artifact.path: artifact.kind for artifact in put(tmp_path / "toy").manifest.artifacts}
    assert kinds == {
        "dynamic.onnx": "graph",
        "static.onnx": "graph",
        "weights/base.safetensors": "weights",
        "weights/static.safetensors": "weights",
        "tokenizer/tokenizer.json": "tokenizer",
        "golden/golden.json": "golden",
    }


def test_parent_folders_are_made(tmp_path: Path) -> None:
    assert put(tmp_path / "a/b/toy").root == tmp_path / "a/b/toy"


def test_an_unpublished_stage_leaves_nothing(tmp_path: Path) -> None:
    with stage(tmp_path / "toy") as made:
        assert made.folder.parent == tmp_path
        write_files(made.folder, bundle_files())
    assert os.listdir(tmp_path) == [".toy.lock"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), InputError("bad")])
def test_an_error_inside_removes_the_stage_and_stays_itself(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        put_with(tmp_path / "toy", failing(error))
    assert caught.value is error
    assert os.listdir(tmp_path) == [".toy.lock"]


def test_an_os_error_inside_is_the_machines_fault(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with pytest.raises(MachineError, match=r"No space left on device; nothing was published\. Fix: free") as caught:
        put_with(tmp_path / "toy", failing(full))
    assert (caught.value.code, caught.value.exit_code) == ("E_DISK", 3)
    assert os.listdir(tmp_path) == [".toy.lock"]


def test_an_existing_bundle_is_kept_unless_asked(tmp_path: Path) -> None:
    old = put(tmp_path / "toy")
    assert isinstance(refusal(tmp_path / "toy", "E_EXISTS", "this bundle exists already.*--overwrite"), ExportError)
    assert open_bundle(tmp_path / "toy").digest == old.digest


def test_overwriting_swaps_old_for_new(tmp_path: Path) -> None:
    old, new = put(tmp_path / "toy"), put(tmp_path / "toy", seed=1, overwrite=True)
    assert open_bundle(tmp_path / "toy").digest == new.digest != old.digest
    assert leftovers(tmp_path) == []


def test_overwriting_works_without_the_kernels_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_renameat2", lambda old, new, flags: False)
    put(tmp_path / "toy")
    new = put(tmp_path / "toy", seed=1, overwrite=True)
    assert open_bundle(tmp_path / "toy").digest == new.digest
    assert leftovers(tmp_path) == []


def test_a_reader_of_the_old_bundle_keeps_its_open_files(tmp_path: Path) -> None:
    old = put(tmp_path / "toy")
    with old.file("dynamic.onnx").open("rb") as file:
        put(tmp_path / "toy", seed=1, overwrite=True)
        assert file.read() == bundle_files()["dynamic.onnx"]
    with pytest.raises(InputError, match="changed after its folder was opened"):
        old.file("dynamic.onnx")


def test_readers_meanwhile_see_the_old_bundle_or_the_new_one(tmp_path: Path) -> None:
    digests = {put(tmp_path / "toy", seed=seed, overwrite=True).digest for seed in (0, 1)}
    seen, codes, stop = set[str](), set[str](), threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(open_bundle(tmp_path / "toy").digest)
            except UserError as error:
                codes.add(error.code)

    thread = threading.Thread(target=read)
    thread.start()
    for round_ in range(30):
        put(tmp_path / "toy", seed=round_ % 2, overwrite=True)
    stop.set()
    thread.join()
    assert seen == digests
    assert codes <= {"E_MISSING"}  # the old folder was removed under its reader


def test_a_damaged_bundle_may_be_overwritten(tmp_path: Path) -> None:
    put(tmp_path / "toy")
    (tmp_path / "toy/dynamic.onnx").write_bytes(b"damaged")
    (tmp_path / "toy/static.onnx").unlink()
    assert open_bundle(put(tmp_path / "toy", overwrite=True).root)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to("elsewhere"),
        lambda path: (path.mkdir(), (path / "thesis.txt").write_text("mine")),
        lambda path: (path.mkdir(), (path / "manifest.json").write_text("{}")),
        lambda path: (path.mkdir(), (path / "manifest.json").write_text('{"format_version": 1, "artifacts": 3}')),
        lambda path: (make_bundle(path), (path / "thesis.txt").write_text("mine")),
        lambda path: (make_bundle(path), (path / "link").symlink_to("/etc")),
        lambda path: (make_bundle(path.with_name("real")), path.symlink_to("real")),
    ],
)
def test_what_is_not_only_a_bundle_is_never_overwritten(tmp_path: Path, make: object, overwrite: bool) -> None:
    make(tmp_path / "mine")  # type: ignore[operator]
    before = sorted(tmp_path.rglob("*"))
    refusal(tmp_path / "mine", "E_EXISTS", "never overwritten", overwrite=overwrite)
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".mine.lock") == before


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="never overwritten"):
        put_with(tmp_path / "toy", lambda folder: (tmp_path / "toy").mkdir(), overwrite=True)
    assert os.listdir(tmp_path / "toy") == []


def test_a_target_that_appears_at_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = publishing._rename_new

    def late(folder: Path, out: Path) -> None:
        out.mkdir()
        rename(folder, out)

    monkeypatch.setattr(publishing, "_rename_new", late)
    with pytest.raises(MachineError, match="File exists; nothing was published"):
        put(tmp_path / "toy")
    assert os.listdir(tmp_path / "toy") == []


@pytest.mark.parametrize("name", ["x" * 181, "/", "a\0b"])
def test_an_impossible_target_is_bad_input(tmp_path: Path, name: str) -> None:
    refusal(tmp_path / name, "E_PATH", "not a name for a bundle")


def test_the_current_folder_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="never overwritten"), stage(Path(".")):
        pass


def test_too_small_a_disk_is_known_before_work(tmp_path: Path) -> None:
    text = r"too little free disk space.*got \d+ MB; need about \d+ MB"
    with pytest.raises(MachineError, match=text) as caught, stage(tmp_path / "toy", estimate_bytes=1 << 60):
        pytest.fail("no work may begin")
    assert caught.value.code == "E_DISK"
    with stage(tmp_path / "toy", estimate_bytes=1000):
        pass


@pytest.mark.parametrize(
    "path",
    ["notes.txt", "build.json", "manifest.json", "model.onnx.data", "deeper/x.onnx", "plugins/evil.so", "weights"],
)
def test_a_file_outside_the_layout_is_not_published(tmp_path: Path, path: str) -> None:
    with pytest.raises(ExportError, match="the bundle's layout has no place for"):
        put_with(tmp_path / "toy", lambda folder: put_file(folder / path))
    assert os.listdir(tmp_path) == [".toy.lock"]


def test_a_link_in_the_stage_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a symbolic link"):
        put_with(tmp_path / "toy", lambda folder: (folder / "weights/more").symlink_to("/etc/passwd"))
    assert os.listdir(tmp_path) == [".toy.lock"]


def test_an_inconsistent_manifest_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a listed graph called static\.onnx"):
        put_with(tmp_path / "toy", lambda folder: (folder / "static.onnx").unlink())
    assert os.listdir(tmp_path) == [".toy.lock"]


def test_unsound_weights_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safetensors header"):
        put_with(tmp_path / "toy", lambda folder: (folder / "weights/base.safetensors").write_bytes(b"garbage" * 9))
    assert os.listdir(tmp_path) == [".toy.lock"]


def test_a_bad_file_name_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the file name 'golden/a b' each part must be letters") as caught:
        put_with(tmp_path / "toy", lambda folder: (folder / "golden/a b").write_bytes(b"x"))
    assert caught.value.code == "E_PATH"


def stale(parent: Path, kind: str, owner: str) -> Path:
    folder = parent / f".toy.{kind}-{owner}-0123abcd"
    folder.mkdir()
    (folder / "part").write_text("x")
    return folder


def test_stages_of_dead_builders_are_collected_and_no_others(tmp_path: Path) -> None:
    me, start = os.getpid(), publishing._start_time(os.getpid())
    dead = [stale(tmp_path, "stage", "4999999-17"), stale(tmp_path, "trash", f"{me}-17")]  # no such pid; pid reused
    old = stale(tmp_path, "stage", f"{me}-{start}")
    os.utime(old, (time.time() - 3700,) * 2)
    kept = [
        tmp_path / f".toy.stage-{me}-{start}-ffffffff",
        tmp_path / ".toy.stage-x.stage-1-1-01234567",
        tmp_path / "toy.stage-1-1-01234567",
    ]
    for folder in kept:
        folder.mkdir()
    put(tmp_path / "toy")
    assert not any(folder.exists() for folder in [*dead, old])
    assert all(folder.exists() for folder in kept)


def test_an_old_bundle_moved_aside_by_a_killed_build_comes_back(tmp_path: Path) -> None:
    old = put(tmp_path / "toy")
    (tmp_path / "toy").rename(tmp_path / ".toy.trash-4999999-17-0123abcd")
    with stage(tmp_path / "toy", overwrite=True):
        assert open_bundle(tmp_path / "toy").digest == old.digest
    assert leftovers(tmp_path) == []


def test_a_second_builder_waits_and_then_finds_the_bundle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    errors: list[UserError] = []

    def second() -> None:
        try:
            put(tmp_path / "toy", seed=1)
        except UserError as error:
            errors.append(error)

    with stage(tmp_path / "toy") as made:
        thread = threading.Thread(target=second)
        thread.start()
        write_files(made.folder, bundle_files())
        while "is being built by another process; waiting" not in caplog.text:
            time.sleep(0.01)
        digest = publish(made, make_manifest()).digest
    thread.join()
    assert "another build published this bundle meanwhile" in str(errors[0])
    assert (errors[0].code, errors[0].exit_code) == ("E_LOST", 3)
    assert open_bundle(tmp_path / "toy").digest == digest


def test_waiting_has_an_end(tmp_path: Path) -> None:
    second = stage(tmp_path / "toy", wait_seconds=0.05)
    with (
        stage(tmp_path / "toy"),
        pytest.raises(MachineError, match="another build holds this target") as caught,
        second,
    ):
        pytest.fail("the first builder still holds the target")
    assert caught.value.code == "E_LOCK"


@pytest.mark.parametrize("fails", [filelock.SoftFileLock, None])
def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: type | None) -> None:
    class NoLock(filelock.FileLock):
        def acquire(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
            raise NotImplementedError

    monkeypatch.setattr(publishing, "FileLock", fails or NoLock)
    refusal(tmp_path / "toy", "E_LOCK", "the file system has no file locks")


def test_a_stage_is_a_plain_value(tmp_path: Path) -> None:
    with stage(tmp_path / "toy") as made:
        assert made == Stage(made.folder, tmp_path / "toy", overwrite=False)


def test_only_bundles_count_as_bundles(tmp_path: Path) -> None:
    assert holds_only_a_bundle(make_bundle(tmp_path / "x"))
    shutil.rmtree(tmp_path / "x/golden")
    assert holds_only_a_bundle(tmp_path / "x")
    assert not holds_only_a_bundle(tmp_path)


def test_a_target_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="lies inside a file"), stage(tmp_path / "notes.txt" / "toy"):
        pytest.fail("the stage opened")


def test_a_place_where_no_file_can_be_made_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """filelock would wait for its file to appear, ten minutes long."""

    def never(self: filelock.FileLock, **_: object) -> None:
        raise filelock.Timeout(self.lock_file)

    monkeypatch.setattr(filelock.FileLock, "acquire", never)
    with pytest.raises(MachineError, match="nothing was published"), stage(tmp_path / "toy"):
        pytest.fail("the stage opened")
