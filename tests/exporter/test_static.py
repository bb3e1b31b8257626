"""Static mode: the folded weights are PEFT's merged ones, and tied embeddings come apart where one side is adapted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from exporter.build_bundle import build
from exporter.parts import Parts
from exporter.spec import AdapterSource
from exporter.static import folded_weights, mix_rows, untied
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.manifest import MixInfo, Mode
from tests.exporter.checkpoint_makers import load_model, write_lora
from tests.exporter.mutations import copy_of, edit_weight, weight_names
from tests.exporter.tiny_builds import (
    assert_wide_margin,
    difference,
    failed,
    load,
    measured,
    named_sources,
    quick,
    write_lively_base,
)

NOISE = 2e-6


def mix_row(mix: Mapping[str, float], experts: Sequence[str]) -> torch.Tensor:
    return mix_rows(MixInfo(weights=dict(mix)), experts, ["site"])[0]


def test_a_mix_follows_the_columns() -> None:
    assert mix_row({"b": 0.5, "a": 2}, ["a", "b", "c"]).tolist() == [2.0, 0.5, 0.0]


def test_a_mix_of_strangers_is_refused() -> None:
    with pytest.raises(InputError, match=r"(?s)mix: 2 problems.*no expert 'y'; need one of: a, b.*no expert 'x'"):
        mix_row({"y": 1, "a": 1, "x": 1}, ["a", "b"])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_mix_that_is_not_finite_is_refused(weight: float) -> None:
    with pytest.raises(ValidationError, match="should be a finite number"):
        mix_row({"a": weight}, ["a"])


def test_a_mix_beyond_float32_is_refused() -> None:
    with pytest.raises(InputError, match=r"the weight of a is 1e\+39; need a number, at most 1000 in size"):
        mix_row({"a": 1e39}, ["a"])


FOLDS = {
    "linear": ("llama", ("q_proj", "down_proj"), {}),
    "rsLoRA": ("llama", ("k_proj",), {"use_rslora": True}),
    "lm_head": ("llama", ("lm_head",), {}),
    "embedding": ("llama", ("embed_tokens",), {}),
    "scaled embedding": ("gemma2", ("embed_tokens", "o_proj"), {}),
    "Conv1D": ("gpt2", ("c_attn", "c_fc"), {"fan_in_fan_out": True}),
}


def folded(parts: Parts, mix: dict[str, float]) -> dict[str, torch.Tensor]:
    row = mix_row(mix, [expert.name for expert in parts.inputs.adapters.experts])
    return {name: weight.load() for name, weight in folded_weights(parts.model, parts.sites, row).items()}


@pytest.mark.parametrize("case", FOLDS)
def test_folded_weights_are_pefts_merge(case: str, tmp_path: Path) -> None:
    from peft import PeftModel

    family, targets, settings = FOLDS[case]
    base = write_lively_base(tmp_path / "base", family)
    path = write_lora(tmp_path / "lora", base, targets, 3, alpha=5, **settings)
    parts = load(base, *named_sources({"one": path}))
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    merged = PeftModel.from_pretrained(load_model(base), str(path)).merge_and_unload().state_dict()
    changed = folded(parts, {"one": 1.0})
    assert len(changed) == len(parts.sites)
    for name, value in changed.items():
        assert difference(value, merged[name]) <= NOISE
        assert difference(value, before[name]) > 0.01
    assert all((before[name] == value).all() for name, value in parts.model.state_dict().items())


def test_a_mix_is_the_weighted_sum_of_the_deltas(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base")
    paths = {
        name: write_lora(tmp_path / name, base, ("q_proj",), rank, seed=rank) for name, rank in (("a", 2), ("b", 5))
    }
    parts = load(base, *named_sources(paths))
    name = "model.layers.1.self_attn.q_proj.weight"
    plain = parts.model.get_parameter(name)
    single = {key: folded(parts, {key: 1.0})[name] - plain for key in paths}
    both = folded(parts, {"a": 0.7, "b": -0.4})[name] - plain
    assert difference(both, 0.7 * single["a"] - 0.4 * single["b"]) <= NOISE
    assert difference(both, 0.7 * single["a"]) > 0.01
    assert difference(both, -0.4 * single["b"]) > 0.01


class Tied(nn.Module):
    """As much of a model as `untied` asks for."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_only_a_tied_model_with_an_adapted_end_is_untied(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base")
    ends = load(base, *named_sources({"e": write_lora(tmp_path / "e", base, ("embed_tokens",), 2)})).sites
    middle = load(base, *named_sources({"m": write_lora(tmp_path / "m", base, ("q_proj",), 2)})).sites
    for model, sites, expected in (
        (Tied(tie=True), ends, {"head.weight": "embed.weight"}),
        (Tied(tie=True), middle, {}),
        (Tied(tie=False), ends, {}),
    ):
        before = model.head.weight
        with untied(model, sites) as twins:  # type: ignore[arg-type]
            assert twins == expected
            assert (model.head.weight is before) == (not expected)
            assert model.head.weight.data_ptr() == before.data_ptr()
        assert model.head.weight is before


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, the embedding adapted, the head not; a dynamic and a static graph in one bundle."""
    folder = tmp_path_factory.mktemp("tied")
    base = write_lively_base(folder / "base", tie_word_embeddings=True, num_hidden_layers=1)
    write_lora(folder / "words", base, ("embed_tokens", "q_proj"), 3, seed=1)
    write_lora(folder / "rest", base, ("q_proj", "up_proj"), 2, seed=2)
    sources = named_sources({name: folder / name for name in ("words", "rest")})
    both = (Mode.DYNAMIC, Mode.STATIC)
    for name in ("bundle", "again"):
        build(replace(quick(sources, base), modes=both, mix={"words": 0.8, "rest": 0.5}, out=folder / name / "b"))
    return folder


@pytest.fixture
def tied(tied_folder: Path) -> Bundle:
    from runtime.bundle import open_bundle

    return open_bundle(tied_folder / "bundle" / "b")


def test_tied_ends_come_apart(tied: Bundle, tied_folder: Path) -> None:
    assert [report.graph for report in tied.manifest.reports] == ["dynamic", "static"]
    for report in tied.manifest.reports:
        assert_wide_margin(report.checks)
        assert report.adapters_matter > 0.5
    static = ir.load(tied.root / "static.onnx").graph.initializers
    places = {name: place(value) for name, value in static.items() if isinstance(value.const_value, ir.ExternalTensor)}
    dynamic = ir.load(tied.root / "dynamic.onnx").graph.initializers
    assert places["lm_head.weight"] == place(dynamic["model.embed_tokens.weight"])
    assert places["model.embed_tokens.weight"][0] == "weights/static.safetensors"
    notes = json.loads((tied.root / "build.json").read_text())["notes"]
    assert any("model.embed_tokens and lm_head share one weight in the base and are untied here" in n for n in notes)


def place(value: ir.Value) -> tuple[str, int | None]:
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return str(tensor.location), tensor.offset


def test_static_adds_only_what_it_changes(tied: Bundle) -> None:
    names = weight_names(tied.root)
    assert len(set(names)) == len(names), "a tensor is stored twice"
    changed = {"model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    assert {name for name in names if name.startswith("static/")} == {f"static/{path}.weight" for path in changed}
    sizes = {path.name: path.stat().st_size for path in (tied.root / "weights").iterdir()}
    assert sizes.keys() == {"base.safetensors", "adapters.safetensors", "static.safetensors"}
    assert sizes["static.safetensors"] == 4096 + 4 * (64 * 32 + 32 * 32 + 48 * 32)
    base_numbers = 64 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 3 * 32
    assert sizes["base.safetensors"] == 4096 + 4 * base_numbers, "tied ends are one tensor"


def test_a_static_graph_with_the_base_weights_is_caught(tied: Bundle, tied_folder: Path, tmp_path: Path) -> None:
    sources = [AdapterSource(tied_folder / name, name) for name in ("words", "rest")]
    parts = load(tied_folder / "base", *sources)
    graph = next(graph for graph in tied.manifest.graphs if graph.mode is Mode.STATIC)
    folder = copy_of(tied.root, tmp_path)
    assert not failed(measured(parts, graph, folder))
    plain = parts.model.get_parameter("model.layers.0.self_attn.q_proj.weight").numpy()
    edit_weight(folder, "static/model.layers.0.self_attn.q_proj.weight", lambda folded: plain)
    assert {"logits", "kld_mean"} <= failed(measured(parts, graph, folder)).keys()


def test_two_builds_are_the_same_bytes(tied_folder: Path) -> None:
    first, second = (tied_folder / name / "b" for name in ("bundle", "again"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    different = [str(path) for path in files if (first / path).read_bytes() != (second / path).read_bytes()]
    assert different == ["build.json"]


def test_graphs_and_manifest_name_no_machine_path(tied: Bundle) -> None:
    checked = [*sorted(tied.root.glob("*.onnx")), tied.root / "manifest.json", *tied.root.glob("golden/*")]
    assert len(checked) == 6
    for path in checked:
        data = path.read_bytes()
        for trace in (b"/work", b"/tmp", b"/home", b"site-packages", b".py"):
            assert trace not in data, (path.name, trace)
    for path in sorted(tied.root.glob("*.onnx")):
        model = ir.load(path)
        assert not model.doc_string
        assert not model.metadata_props
        assert not model.graph.doc_string
        for node in model.graph:
            assert not node.doc_string, node
            assert not node.metadata_props, node
            assert not any(value.doc_string for value in node.outputs)
