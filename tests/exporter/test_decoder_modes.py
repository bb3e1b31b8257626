"""What else a build can be, over families: rounded, without cache, with plugins, merged and saved, as an engine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from exporter.build_bundle import build
from exporter.engines import EngineSpec, build_engines
from exporter.op_lint import lint
from exporter.spec import CacheChoice, DType, OpChoice
from plugins.operators import GATED_LOW_RANK
from runtime import GenerateOptions, Routed, complete, load
from runtime.bundle import open_bundle
from runtime.engines import Target
from runtime.manifest import Mode
from runtime.signature import CacheStyle
from tests.exporter.checkpoint_makers import write_dora
from tests.exporter.peft_models import greedy, logits_of, peft_lora
from tests.exporter.tiny_builds import (
    DECODERS,
    FAMILIES,
    TARGETS,
    Built,
    assert_wide_margin,
    build_family,
    difference,
    measured_precisely,
    named_sources,
    prompt,
    quick,
    reference_of,
    shown,
    write_checkpoint,
    write_lively_base,
    write_three_experts,
)
from tests.exporter.tiny_builds import load as load_parts
from tests.same_tokens import Ties, seen_logits

NEW = tuple(family for family in DECODERS if family not in FAMILIES)
ROUNDED = [(family, dtype) for dtype in (DType.FLOAT16, DType.BFLOAT16) for family in DECODERS]
LOGITS = 1e-5
MATTERS = 0.05
TOKENS = prompt(17)


@pytest.mark.parametrize("family", DECODERS)
def test_dora_is_peft(family: str, tmp_path: Path) -> None:
    """On the fused, projected and two-dimensional modules of each family."""
    base = write_lively_base(tmp_path / "base", family)
    attention, mlp = TARGETS.get(family, (("q_proj",), ("down_proj",)))
    turned = {"fan_in_fan_out": True} if family == "gpt2" else {}
    path = write_dora(tmp_path / "dora", base, (*attention, *mlp), **turned)
    reference = reference_of(load_parts(base, *named_sources({"dora": path})))
    expected = logits_of(peft_lora(base, path), TOKENS)
    got = reference.constant([1.0], TOKENS).logits
    assert float(((got - expected).abs() / (1 + expected.abs())).max()) <= LOGITS
    assert difference(reference.constant([0.0], TOKENS).logits, expected) > MATTERS


@pytest.mark.long
@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gpt2", "mixtral"])
@pytest.mark.parametrize("site_op", list(OpChoice))
def test_dora_beside_lora_in_both_graphs(family: str, site_op: OpChoice, tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", family, **({} if family == "gpt2" else {"num_hidden_layers": 1}))
    attention, mlp = TARGETS[family]
    turned = {"fan_in_fan_out": True} if family == "gpt2" else {}
    paths = write_three_experts(tmp_path / "experts", base, family, ends=False)
    paths["dora"] = write_dora(tmp_path / "dora", base, (attention[0], *mlp), **turned)
    spec = replace(quick(named_sources(paths), base), modes=(Mode.DYNAMIC, Mode.STATIC), mix={"dora": 1.0})
    bundle = build(replace(spec, out=tmp_path / "bundle", site_op=site_op))
    for report in bundle.manifest.reports:
        assert_wide_margin(report.checks)
        assert report.checks[0].value <= LOGITS
    nodes = ir.load(bundle.root / "dynamic.onnx").graph
    assert (GATED_LOW_RANK in {node.op_type for node in nodes}) is (site_op is OpChoice.PLUGIN)
    ties, oracle = Ties(), peft_lora(base, paths["dora"])
    with load(bundle.root, threads=1) as model, seen_logits() as seen:
        complete(model, [Routed(TOKENS, "dora"), Routed(TOKENS, "code")], GenerateOptions(max_new_tokens=8))
    ties.compare(greedy(oracle, TOKENS, 8), seen[0], "dora")
    ties.compare(greedy(peft_lora(base, paths["code"]), TOKENS, 8), seen[1], "code")
    ties.check()


@pytest.mark.long
@pytest.mark.parametrize("family", DECODERS)
def test_a_graph_without_cache_is_the_reference(family: str, tmp_path: Path) -> None:
    built = build_family(tmp_path, family, cache=CacheChoice.NONE)
    [graph], [report] = built.bundle.manifest.graphs, built.bundle.manifest.reports
    assert graph.signature.cache_style is CacheStyle.NONE
    assert_wide_margin(report.checks)
    precise = measured_precisely(built.checkpoint.parts(), graph, built.bundle.root)
    assert precise.checks[0].value <= LOGITS, shown(precise.checks)
    assert report.adapters_matter > 0.5
    assert lint(ir.load(built.bundle.root / "dynamic.onnx")) == ()


@pytest.mark.long
@pytest.mark.parametrize(("family", "dtype"), ROUNDED)
def test_rounded_builds_are_their_twins_rounding(family: str, dtype: DType, tmp_path: Path) -> None:
    built = build_family(tmp_path, family, dtype=dtype, modes=(Mode.DYNAMIC, Mode.STATIC), mix={"code": 1.0})
    assert [graph.name for graph in built.bundle.manifest.graphs] == ["dynamic", "static"]
    assert all(check.passed for report in built.bundle.manifest.reports for check in report.checks)
    for name in ("dynamic", "static"):
        model = ir.load(built.bundle.root / f"{name}.onnx")
        assert lint(model) == ()
        kinds = {value.dtype for value in model.graph.initializers.values()}
        assert getattr(ir.DataType, dtype.value.upper()) in kinds


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "mixtral"])
def test_a_merged_mix_is_saved_as_a_lora_that_peft_loads(family: str, tmp_path: Path) -> None:
    mix = {"math": 0.7, "code": 0.3, "prose": -0.4}
    blocks: dict[str, Any] = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    base = write_lively_base(tmp_path / "base", family, **blocks)
    paths = write_three_experts(tmp_path / "experts", base, family, ends=False)
    spec = replace(quick(named_sources(paths), base), modes=(Mode.STATIC,), mix=mix, save_adapter=tmp_path / "saved")
    build(replace(spec, out=tmp_path / "bundle"))
    expected = reference_of(load_parts(base, *named_sources(paths))).constant(list(mix.values()), TOKENS).logits
    got = logits_of(peft_lora(base, tmp_path / "saved"), TOKENS)
    assert float(((got - expected).abs() / (1 + expected.abs())).max()) <= LOGITS


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "darwin", reason="TensorRT for RTX has no macOS package")
@pytest.mark.parametrize("family", DECODERS)
def test_an_engine_for_rtx_is_built(family: str, family_build: Callable[[str], Built], tmp_path: Path) -> None:
    """Built without a GPU: TensorRT takes every operator and shape. Nothing here has run on one."""
    pytest.importorskip("tensorrt_rtx")
    bundle = open_bundle(Path(shutil.copytree(family_build(family).bundle.root, tmp_path / "bundle")))
    spec = EngineSpec(Target.TRT_RTX, compute_capabilities=("8.6",), max_batch=2, max_tokens=16, max_context=64)
    engines = build_engines(bundle, spec)
    assert [artifact for artifact in engines.manifest.artifacts if artifact.size > 1000]


@pytest.mark.long
def test_text_of_a_model_that_also_sees_images(tmp_path: Path) -> None:
    """Gemma3 with its vision tower: the tower is no part of the graph nor of the store."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.exporter.checkpoint_makers import FAMILY_SIZES, SIZES, write_lora

    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = SIZES | FAMILY_SIZES["gemma3_text"]
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    path = write_lora(tmp_path / "one", tmp_path / "base", r".*language_model.*\.(q_proj|v_proj)", 2)
    bundle = build(replace(quick(named_sources({"one": path}), tmp_path / "base"), out=tmp_path / "bundle"))
    assert bundle.manifest.reports[0].checks[0].value <= LOGITS
    assert bundle.manifest.reports[0].adapters_matter > 1e-3
    names = [value.name for value in ir.load(bundle.root / "dynamic.onnx").graph.initializers.values()]
    assert not [name for name in names if name and "vision" in name]


@pytest.mark.long
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_prompt_of_several_chunks_crosses_windows(family: str, tmp_path: Path) -> None:
    """A prompt goes in 512 tokens at a time; windows of 8 reach from one chunk into the one before."""
    checkpoint = write_checkpoint(tmp_path, family, max_position_embeddings=640)
    bundle = build(checkpoint.spec(out=tmp_path / "bundle"))
    rows = [Routed(prompt(length, seed=length), "xlora") for length in (600, 515, 7)]
    reference, ties = reference_of(checkpoint.parts()), Ties()
    with load(bundle.root, threads=1) as model, seen_logits() as seen:
        complete(model, rows, GenerateOptions(max_new_tokens=2))
    for place, row in enumerate(rows):
        want = [reference.gated(row.prompt).logits[-1].numpy()]  # type: ignore[arg-type]
        ties.compare(want, seen[place][:1], f"row {place}")
    ties.check()
