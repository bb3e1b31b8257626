"""A manifest is read strictly: every kind of fault is refused with a code and the field's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import strict_json
from runtime.bundle import read_manifest
from runtime.errors import InputError
from runtime.manifest import Manifest, OnnxRuntimeForm, is_expert_name
from runtime.safe_files import path_problem
from runtime.sealed_folder import MAX_MANIFEST_BYTES, manifest_bytes
from runtime.signature import CacheStyle, in_style
from tests.runtime.bundle_makers import artifacts_of, bundle_files, make_manifest

Value = dict[str, Any]


def value() -> Value:
    """A good manifest as plain JSON, for tests to spoil."""
    manifest: Value = json.loads(manifest_bytes(make_manifest(artifacts_of(bundle_files()))))
    return manifest


def refusal(data: bytes, code: str, text: str) -> InputError:
    with pytest.raises(InputError, match=text) as caught:
        read_manifest(data)
    assert caught.value.code == code
    return caught.value


def test_a_manifest_survives_the_round_trip() -> None:
    manifest = make_manifest(artifacts_of(bundle_files()))
    data = manifest_bytes(manifest)
    assert read_manifest(data) == manifest
    assert manifest_bytes(read_manifest(data)) == data


def test_a_manifest_from_before_merges_is_read() -> None:
    manifest = value()
    for graph in manifest["graphs"]:
        assert (graph.pop("mix_sites"), graph.pop("merge")) == ({}, None)
    assert read_manifest(json.dumps(manifest).encode()).graphs[1].merge is None


def test_a_manifest_is_written_one_way() -> None:
    data = manifest_bytes(make_manifest(artifacts_of(bundle_files()), name="naïve"))
    assert data.endswith(b"}\n")
    assert "naïve".encode() in data
    keys = list(json.loads(data))
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff{}", r"is not UTF-8 \(byte 0\)"),
        ("{}".encode("utf-16"), "is not UTF-8"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice"),
        (b'{"a": NaN}', "holds NaN, which is not JSON"),
        (b'{"a": -Infinity}', "holds -Infinity, which is not JSON"),
        (b'{"a": 1e999}', "holds a number out of range: 1e999"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b"9" * 100_000, "the manifest "),
        (b" " * (MAX_MANIFEST_BYTES + 1), "has more than 8388608 bytes"),
        (b"[" + b"[]," * 200_000 + b"[]]", "holds more than 250000 values"),
        (b"[]", "has no format_version"),
        (b"7", "has no format_version"),
        (b'{"format_version": "1"}', "has no format_version"),
        (b'{"format_version": true}', "has no format_version"),
    ],
)
def test_bad_json_is_refused(data: bytes, text: str) -> None:
    refusal(data, "E_MANIFEST", text)


@pytest.mark.parametrize(("version", "fix"), [(2, "use a newer runtime"), (0, "build it again")])
def test_another_version_is_told_which_one_is_read(version: int, fix: str) -> None:
    data = json.dumps({"format_version": version, "fields": "of another time"}).encode()
    refusal(data, "E_VERSION", f"got version {version}; need version 1, the only one this runtime reads. Fix: {fix}")


def test_an_absurd_version_is_not_printed() -> None:
    assert len(str(refusal(b'{"format_version": ' + b"9" * 4000 + b"}", "E_VERSION", "an absurd number"))) < 300


def _set(*path: str | int, to: object) -> Callable[[Value], None]:
    def spoil(manifest: Value) -> None:
        at: Any = manifest
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return spoil


def _drop(key: str) -> Callable[[Value], None]:
    return lambda manifest: manifest.pop(key)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_set("surprise", to=1), "surprise: Extra inputs are not permitted"),
        (_set("base", "surprise", to=1), r"base\.surprise: Extra inputs"),
        (_set("graphs", 0, "signature", "inputs", 0, "x", to=1), "graphs.0.signature"),
        (_drop("sites"), "sites: Field required"),
        (_set("base", "blocks", to="2"), r"base\.blocks: Input should be a valid integer"),
        (_set("base", "blocks", to=2.0), r"base\.blocks"),
        (_set("artifacts", 0, "size", to=-1), r"artifacts\.0\.size"),
        (_set("artifacts", 0, "sha256", to="A" * 64), r"artifacts\.0\.sha256"),
        (_set("artifacts", 0, "kind", to="plugin"), r"artifacts\.0\.kind"),
        (_set("experts", 0, "name", to="a/b"), r"experts\.0\.name.*letters, digits"),
        (_set("experts", 0, "name", to="CON"), r"experts\.0\.name.*no device name"),
        (_set("build_log", to="../build.json"), "build_log"),
        # contradictions between the parts
        (_set("experts", 0, "column", to=1), "experts: need unique names and columns 0, 1, 2, … in order"),
        (_set("experts", 0, "name", to="code"), "experts: need unique names"),
        (_set("sites", 0, "experts", to=["math", "nobody"]), r"sites\.model\.layers\.0\.q_proj: experts"),
        (_set("sites", 0, "ranks", to=[4]), r"do not fit \['math', 'code'\]"),
        (_set("sites", 0, "path", to="model.layers.1.q_proj"), "sites: has a path twice"),
        (_set("gate", "scaling_pass_row", to=[0.0]), "gate: its row has 1 entries, there are 2 experts"),
        (_set("graphs", to=[]), "needs at least one graph"),
        (_set("graphs", 0, "name", to="static"), "each with its own name"),
        (_set("graphs", 0, "path", to="golden/golden.json"), "is not a listed graph called dynamic.onnx"),
        (_set("graphs", 0, "mix", to={"math": 1.0}), "a static graph has a mix, a dynamic one has none"),
        (_set("graphs", 1, "mix", to=None), "a static graph has a mix, a dynamic one has none"),
        (_set("graphs", 1, "mix", to={"art": 1.0}), "its mix names unknown experts: art"),
        (_set("graphs", 1, "mix_sites", to={"nowhere": {"art": 1.0}}), "its mix names unknown experts: art"),
        (_set("graphs", 1, "mix_sites", to={"nowhere": {"math": 1.0}}), "its mix names unknown sites: nowhere"),
        (_set("graphs", 0, "mix_sites", to={"nowhere": {"math": 1.0}}), "a dynamic graph has no merge"),
        (_set("graphs", 0, "merge", to={"method": "svd"}), "a dynamic graph has no merge"),
        (_set("graphs", 1, "signature", "inputs", 0, "name", to="scalings"), "a static graph takes no scalings"),
        (_set("graphs", 0, "signature", "inputs", 0, "name", to="position_ids"), "its signature has a name twice"),
        (_set("graphs", 0, "signature", "carries", 0, "input", to="zzz"), "carries tensors that it does not have"),
        (_set("graphs", 0, "signature", "carries", 0, "output", to="zzz"), "carries tensors that it does not have"),
        (_set("tokenizer", "path", to="tokenizer/other.json"), "tokenizer: its file 'tokenizer/other.json'"),
        (_set("reports", 0, "graph", to="zzz"), r"reports: are of \['zzz', 'static'\], the graphs are"),
        (_set("reports", 0, "graph", to="static"), r"reports: are of \['static', 'static'\]"),
        (_set("reports", 0, "checks", 0, "value", to=1.0), r"reports\.dynamic\.kl_mean: says passed where"),
    ],
)
def test_a_spoiled_field_is_named(spoil: Callable[[Value], None], text: str) -> None:
    manifest = value()
    spoil(manifest)
    refusal(json.dumps(manifest).encode(), "E_MANIFEST", text)


def with_form(style: CacheStyle, path: str) -> bytes:
    """The dynamic graph with a form for ONNX Runtime, whose file is listed where it has its right name."""
    files = bundle_files() | {"dynamic.ort.onnx": b"form"}
    listed = make_manifest(artifacts_of(files))
    form = OnnxRuntimeForm(path=path, opset=24, signature=in_style(listed.graphs[0].signature, style))
    graphs = (listed.graphs[0].model_copy(update={"onnxruntime": form}), *listed.graphs[1:])
    return manifest_bytes(listed.model_copy(update={"graphs": graphs}))


def test_a_form_for_onnxruntime_is_listed_and_has_its_caches_in_place() -> None:
    read = read_manifest(with_form(CacheStyle.ALIAS, "dynamic.ort.onnx"))
    assert read.graphs[0].onnxruntime is not None
    assert read.graphs[0].onnxruntime.signature.carries[0].style is CacheStyle.ALIAS
    assert read.graphs[0].onnxruntime.signature.output("present_key_0") != read.graphs[0].signature.output(
        "present_key_0"
    )
    other = "its form for ONNX Runtime has another signature"
    refusal(with_form(CacheStyle.APPEND, "dynamic.ort.onnx"), "E_MANIFEST", other)
    unlisted = "its form 'dynamic.onnx' is not a listed graph called dynamic.ort.onnx"
    refusal(with_form(CacheStyle.ALIAS, "dynamic.onnx"), "E_MANIFEST", unlisted)


def test_several_faults_are_reported_at_once_but_not_thousands() -> None:
    manifest = value()
    manifest["sites"] = [{} for _ in range(500)]
    text = str(refusal(json.dumps(manifest).encode(), "E_MANIFEST", "8 problems"))
    assert text.count("\n") == 8


def test_a_huge_value_is_not_echoed() -> None:
    manifest = value()
    manifest["base"]["blocks"] = "x" * 1_000_000
    manifest["y" * 1_000_000] = 1
    assert len(str(refusal(json.dumps(manifest).encode(), "E_MANIFEST", "problems"))) < 2000


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"path": "a/../b"}, "each part must be"),
        ({"path": "/abs"}, "must be relative"),
        ({"path": ""}, "must have 1 to 255 characters"),
        ({"path": "x" * 256}, "must have 1 to 255 characters"),
        ({"path": "tokenizer/nul.txt"}, "is a device name on Windows"),
        ({"path": "manifest.json"}, "is the format's own file"),
        ({"path": "Build.json"}, "is the format's own file"),
        ({"path": "static.onnx"}, "collides with another listed path"),
        ({"path": "STATIC.onnx"}, "collides with another listed path"),
        ({"path": "Weights/x"}, "collides with another listed path"),
        ({"path": "weights"}, "collides with another listed path"),
    ],
)
def test_a_bad_listed_path_is_refused(change: Value, text: str) -> None:
    manifest = value()
    manifest["artifacts"][0] |= change
    refusal(json.dumps(manifest).encode(), "E_PATH", text)


@pytest.mark.parametrize(
    ("kind", "size", "text"),
    [
        ("graph", (2 << 30) + 1, "a graph has at most"),
        ("weights", (512 << 30) + 1, "a weights has at most"),
        ("tokenizer", (256 << 20) + 1, "a tokenizer has at most"),
        ("golden", 10**30, "a golden has at most"),
    ],
)
def test_too_large_a_file_is_refused_unread(kind: str, size: int, text: str) -> None:
    manifest = value()
    manifest["artifacts"][2] |= {"kind": kind, "size": size}
    refusal(json.dumps(manifest).encode(), "E_LIMIT", text)


def test_too_many_or_too_much_is_refused_unread() -> None:
    manifest = value()
    extra = {"kind": "weights", "size": 400 << 30, "sha256": "0" * 64}
    manifest["artifacts"] += [extra | {"path": f"weights/{number}"} for number in range(3)]
    refusal(json.dumps(manifest).encode(), "E_LIMIT", "bytes in all, at most")
    manifest["artifacts"] += [extra | {"size": 0, "path": f"weights/x{number}"} for number in range(512)]
    refusal(json.dumps(manifest).encode(), "E_LIMIT", "lists 521 files, at most 512")


@given(st.binary(max_size=300))
def test_any_bytes_are_parsed_or_refused_in_one_line(data: bytes) -> None:
    text = ""
    try:
        strict_json.parse(data, max_bytes=200)
    except ValueError as error:
        text = str(error)
    assert "\n" not in text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_no_other_json_passes_for_a_manifest(junk: object) -> None:
    manifest = value()
    for key in list(manifest)[:3]:
        with pytest.raises(InputError):
            read_manifest(json.dumps(manifest | {key: {"junk": junk}}).encode())


@pytest.mark.parametrize("name", ["math", "a", "0", "x" * 64, "A-b_c", "console"])
def test_good_expert_names(name: str) -> None:
    assert is_expert_name(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "-a", "_a", "a.b", "a b", "a/b", "a\n", "é", "con", "LPT1", "a\0"])
def test_bad_expert_names(name: str) -> None:
    assert not is_expert_name(name)


@pytest.mark.parametrize("path", ["a", "weights/base.safetensors", "a/b/c/d", "_x", "x-1+2_3.tar", "x" * 100])
def test_good_paths(path: str) -> None:
    assert path_problem(path) is None


def test_manifests_are_frozen() -> None:
    manifest = make_manifest()
    with pytest.raises(ValueError, match="frozen"):
        manifest.name = "other"
    assert isinstance(manifest, Manifest)
