"""The weight store: files that safetensors reads, each tensor once, every graph pointing at the right bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from exporter.store import Weight, WeightStore, weight_from_tensor
from tests.exporter.tiny_builds import Built

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.arange(5, dtype=torch.float16),
    "c.x": torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
    "d": torch.tensor([7, -1], dtype=torch.int64),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
    "transposed": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
}


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    store = WeightStore(tmp_path)
    store.write("base", [weight_from_tensor(name, tensor) for name, tensor in TENSORS.items()])
    return store


def test_safetensors_reads_what_was_streamed(store: WeightStore, tmp_path: Path) -> None:
    read = load_file(tmp_path / "weights" / "base.safetensors")
    assert list(read) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)
        assert name == "empty" or torch.equal(store.read(name), tensor)


def test_offsets_are_those_of_the_file(store: WeightStore, tmp_path: Path) -> None:
    """Data starts on a page and has no holes, in the order of the names."""
    end = 4096
    data = (tmp_path / "weights" / "base.safetensors").read_bytes()
    for name in sorted(TENSORS):
        stored = store.stored[name]
        assert (stored.path, stored.offset) == ("weights/base.safetensors", end)
        bits = TENSORS[name].contiguous().view(torch.uint8) if TENSORS[name].dim() else TENSORS[name]
        assert data[stored.offset : stored.offset + stored.length] == bits.numpy().tobytes()
        end += stored.length
    assert len(data) == end


@pytest.mark.parametrize("name", ["a", "b", "c.x", "d"])
def test_external_tensor_is_the_tensor(name: str, store: WeightStore) -> None:
    external = store.external(name)
    assert external.location == "weights/base.safetensors"
    assert np.array_equal(external.numpy().astype(np.float32), TENSORS[name].float().numpy())


def test_a_tensor_is_stored_once_and_a_file_written_once(store: WeightStore, tmp_path: Path) -> None:
    before = (tmp_path / "weights" / "base.safetensors").read_bytes()
    again = [weight_from_tensor("b", torch.zeros(2, 3)), weight_from_tensor("new", torch.ones(3))]
    store.write("base", again)
    store.write("base", again)
    assert (tmp_path / "weights" / "base.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["base-2.safetensors", "base.safetensors"]
    assert list(load_file(tmp_path / "weights" / "base-2.safetensors")) == ["new"]
    assert torch.equal(store.read("b"), TENSORS["b"])


def test_nothing_new_makes_no_file(tmp_path: Path) -> None:
    WeightStore(tmp_path).write("base", [])
    assert not (tmp_path / "weights").exists()


def test_values_are_loaded_one_at_a_time_in_file_order(tmp_path: Path) -> None:
    loaded: list[str] = []

    def weight(name: str) -> Weight:
        def load() -> torch.Tensor:
            loaded.append(name)
            return torch.zeros(1024)

        return Weight(name, torch.float32, (1024,), load)

    weights = [weight("z"), weight("a"), weight("m")]
    assert loaded == []
    WeightStore(tmp_path).write("base", weights)
    assert loaded == ["a", "m", "z"]


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.float16)])
def test_a_weight_must_be_as_announced(wrong: torch.Tensor, tmp_path: Path) -> None:
    announced = Weight("w", torch.float32, (2,), lambda: wrong)
    with pytest.raises(AssertionError, match=r"w: announced torch\.float32 \(2,\), got torch\.float"):
        WeightStore(tmp_path).write("base", [announced])


def test_a_graph_points_at_its_own_tensors(family_build: Callable[[str], Built]) -> None:
    """Every external initializer is a whole tensor of a weights file, of the same name, dtype and shape."""
    root = family_build("llama").bundle.root
    names: list[str] = []
    places: dict[str, tuple[str, int]] = {}
    for path in sorted((root / "weights").iterdir()):
        with safe_open(path, "pt") as file:
            names += file.keys()
    graph = ir.load(root / "dynamic.onnx").graph
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            places[name] = (str(tensor.location), tensor.offset or 0)
            with safe_open(root / str(tensor.location), "np") as file:
                assert np.array_equal(file.get_tensor(name), tensor.numpy())
    assert sorted(names) == sorted(places), "stored but unused, or used but not stored"
    assert len(set(places.values())) == len(places)
    assert {location for location, _ in places.values()} == {
        "weights/base.safetensors", "weights/adapters.safetensors"
    }  # fmt: skip
