"""A graph's weights lie in the bundle's own weights/, or the build is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.errors import ExportError
from exporter.external_data import check_external_data
from runtime.errors import InputError

GOOD = {"location": "weights/base.safetensors", "offset": "8", "length": "24"}


def external(name: str = "w", **entries: str) -> TensorProto:
    """A float32 [2, 3] tensor whose data lies elsewhere."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def stage(folder: Path, *nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = ()) -> Path:
    """A folder with one graph and 40 bytes of weights."""
    (folder / "weights").mkdir()
    (folder / "weights/base.safetensors").write_bytes(b"\0" * 40)
    inner = numpy_helper.from_array(np.zeros(3, np.float32), "inside")
    graph = helper.make_graph(list(nodes), "g", [], [], [inner, *initializers])
    onnx.save_model(helper.make_model(graph), folder / "dynamic.onnx")
    return folder


def test_tensors_inside_the_weights_pass(tmp_path: Path) -> None:
    check_external_data(stage(tmp_path, initializers=(external(**GOOD), external("v", **GOOD | {"offset": "16"}))))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"location": "../secret"}, "its data lies at '../secret'"),
        ({"location": "/etc/passwd"}, "its data lies at '/etc/passwd'"),
        ({"location": "weights/other.safetensors"}, "its data lies at 'weights/other"),
        ({"location": "dynamic.onnx"}, r"its data lies at 'dynamic\.onnx'"),
        ({"offset": "17"}, "bytes 17 to 41 lie beyond the 40 of weights/base"),
        ({"length": str(2**50)}, "lie beyond"),
        ({"offset": "-4"}, "its offset '-4' or length '24' is no number"),
        ({"length": "9" * 50}, "is no number"),
        ({"length": "20"}, "its shape needs 24 bytes, not 20"),
        ({"checksum": "x"}, "location, offset and length once each, not"),
    ],
)
def test_any_other_place_is_refused(tmp_path: Path, change: dict[str, str], text: str) -> None:
    with pytest.raises(ExportError, match=text) as caught:
        check_external_data(stage(tmp_path, initializers=(external(**GOOD | change),)))
    assert caught.value.code == "E_EXTERNAL"
    assert "dynamic.onnx: w" in str(caught.value)


def test_a_missing_or_repeated_key_is_refused(tmp_path: Path) -> None:
    twice = external("twice", **GOOD)
    twice.external_data.add(key="location", value="weights/base.safetensors")
    hidden = external("hidden", **GOOD | {"location": "../x"})
    hidden.data_location = TensorProto.DEFAULT
    with pytest.raises(InputError, match="3 problems") as caught:
        check_external_data(stage(tmp_path, initializers=(external("less", location="x"), twice, hidden)))
    assert all(f"dynamic.onnx: {name}" in str(caught.value) for name in ("less", "twice", "hidden"))


def test_constants_in_subgraphs_are_seen(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=external("deep", **GOOD | {"location": "../x"}))
    branch = helper.make_graph([constant], "branch", [], [])
    node = helper.make_node("If", ["inside"], [], then_branch=branch, else_branch=branch)
    with pytest.raises(InputError, match=r"2 problems\n  - dynamic\.onnx: deep"):
        check_external_data(stage(tmp_path, node))


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (stage(tmp_path) / "static.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(ExportError, match=r"static\.onnx: is not an ONNX graph"):
        check_external_data(tmp_path)
