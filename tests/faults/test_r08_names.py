"""R08: 500 hostile names, as listed paths, staged files and experts: all refused, nothing touched outside."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from exporter.publish import publish, stage
from runtime.bundle import open_bundle
from runtime.errors import InputError, UserError
from runtime.manifest import is_expert_name
from runtime.sealed_folder import manifest_bytes
from tests.runtime.bundle_makers import artifacts_of, bundle_files, make_bundle, make_manifest, seal, write_files

_EVIL = [
    "..",
    ".",
    "",
    "/",
    "/etc/passwd",
    "//x",
    "../x",
    "a/../../x",
    "a/..",
    "a//b",
    "./a",
    "a/",
    "a/./b",
    "~",
    "~root/x",
]
_EVIL += [
    "a\\b",
    "..\\x",
    "C:\\x",
    "C:x",
    "c:/x",
    "\\\\host\\share",
    "x:stream",
    "a\0b",
    "\0",
    "a\nb",
    "a\rb",
    "a\tb",
    "a b",
]
_EVIL += [
    " a",
    "a ",
    "a.",
    "a..",
    ".hidden",
    "-rf",
    "--out",
    "$(id)",
    "`id`",
    "a;b",
    "a|b",
    "a&b",
    "a*",
    "a?",
    "a'b",
    'a"b',
]
_EVIL += [
    "é",
    "e\u0301",
    "ａ",
    "а",
    "a\u202eb",
    "a\u200bb",
    "․․",
    "‥",
    "∕etc",
    "a⁄b",
    "\ufeffa",
    "😀",
    "a\x7f",
    "a\x1b[2J",
    "ı",
    "ſ",
]
_EVIL += [
    "x" * 300,
    "x" * 5000,
    "a/" * 150 + "x",
    "%2e%2e/x",
    "..%2fx",
    "a%00b",
    "file:///x",
    "http://x/y",
    "@x",
    "#x",
    "!x",
]
_DEVICES = ["con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))]
_DEVICE_NAMES = [form.format(name) for name in _DEVICES for form in ("{}", "{}.txt", "weights/{}", "{}.tar.gz/x")]
_DEVICE_NAMES += [name.upper() for name in _DEVICES]
_PLACES = ["{}", "weights/{}", "{}/x", "tokenizer/{}/x", "golden/{}/y/z", "x/y/{}"]
NAMES = sorted({place.format(name) for name in _EVIL for place in _PLACES} | set(_DEVICE_NAMES))


def test_there_are_enough_names() -> None:
    assert len(NAMES) >= 500


def test_no_listed_path_leads_out(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "toy")
    (tmp_path / "x").write_text("secret")
    good = json.loads(manifest_bytes(make_manifest(artifacts_of(bundle_files()))))
    for name in NAMES:
        listed = {"kind": "golden", "path": name, "size": 6, "sha256": "0" * 64}
        seal(folder, json.dumps(good | {"artifacts": [*good["artifacts"], listed]}).encode())
        with pytest.raises(InputError) as caught:
            open_bundle(folder)
        assert caught.value.code in ("E_PATH", "E_MANIFEST"), name
        assert len(str(caught.value)) < 1500
        assert str(caught.value).isprintable()


def _try_publish(out: Path, name: str) -> bool:
    """Publish with one more file of that name, where the file system can hold it. True if there was such a file."""
    with stage(out) as made:
        write_files(made.folder, bundle_files())
        target = made.folder / "golden" / name.replace("/", "_")
        try:
            target.write_bytes(b"x")
        except (OSError, ValueError):
            return False
        if not target.is_relative_to(made.folder) or target.parent != made.folder / "golden":
            return False
        publish(made, make_manifest())
    return True


def test_no_staged_file_of_a_bad_name_is_published(tmp_path: Path) -> None:
    for number, name in enumerate(_EVIL + _DEVICE_NAMES[::5]):
        out = tmp_path / f"b{number}"
        flat = name.replace("/", "_")
        try:
            made = _try_publish(out, name)
        except UserError:
            assert not out.exists()
            continue
        if made:  # with its slashes gone the name was harmless
            assert all(part not in ("", ".", "..") for part in flat.split("/"))
            assert open_bundle(out)
    assert {name for name in os.listdir(tmp_path) if not name.startswith((".b", "b"))} == set()


def test_no_hostile_name_names_an_expert() -> None:
    names = [*_EVIL, *_DEVICES, *(name.upper() for name in _DEVICES), *NAMES]
    names += ["".join(pair) for pair in itertools.product("./\\\0: é", repeat=2)]
    assert len(set(names)) >= 400
    assert [name for name in names if is_expert_name(name)] == []
