"""Tracing: what goes in and out is the signature's, every size is free; what cannot be traced is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch

from exporter.attention import CacheState, require_window
from exporter.build_bundle import build
from exporter.dynamic import traced_model
from exporter.errors import ExportError
from exporter.graph_exports import export_dynamic
from exporter.inputs import check_spec, default_out
from exporter.model_facts import refuse_untraceable, untying_notes
from exporter.passes.name_weights import NameWeightsPass
from exporter.spec import AdapterSource, BuildSpec, CacheChoice, DType
from exporter.store import WeightStore
from exporter.trace import EXAMPLE_SIZES, example_inputs
from runtime.manifest import Emit, Mode
from runtime.signature import CacheStyle, SignatureShape, signature_from_shape
from tests.exporter.checkpoint_makers import edit_json, load_model, write_base, write_lora
from tests.exporter.tiny_builds import Built, assert_named_dimensions, load, named_sources, quick, write_lively_base


def test_inputs_and_outputs_are_the_signatures(family_build: Callable[[str], Built]) -> None:
    bundle = family_build("llama").bundle
    signature = bundle.manifest.graphs[0].signature
    graph = ir.load(bundle.root / "dynamic.onnx").graph
    for specs, values in ((signature.inputs, graph.inputs), (signature.outputs, graph.outputs)):
        assert [spec.name for spec in specs] == [value.name for value in values]
        for spec, value in zip(specs, values, strict=True):
            assert value.dtype is not None
            assert str(value.dtype.numpy()) == spec.dtype
            assert value.shape is not None
            assert [isinstance(size, int) for size in value.shape] == [isinstance(size, int) for size in spec.shape]
    assert_named_dimensions(bundle)


def test_example_sizes_specialise_nothing() -> None:
    """torch.export fixes sizes of 0 and 1, and takes equal sizes for one and the same."""
    assert min(EXAMPLE_SIZES.values()) > 1
    assert len(set(EXAMPLE_SIZES.values())) == len(EXAMPLE_SIZES)


@pytest.mark.parametrize("cache", CacheStyle)
def test_example_inputs_have_the_signatures_shapes(cache: CacheStyle) -> None:
    shape = SignatureShape(9, (2, 2), (4, 4), scalings=3, experts=2, gate=True, cache=cache)
    inputs = example_inputs(signature_from_shape(shape))
    assert inputs["input_ids"].shape == (2, 3)
    assert inputs["scalings"].shape == (2, 3, 3, 2)
    assert inputs["logit_index"].shape == (2, 5)
    assert int(inputs["logit_index"].max()) < 3, "an index beyond S fails in the trace itself"
    assert [tuple(past.shape) for past in inputs.get("past", [])] == (
        [] if cache is CacheStyle.NONE else [(2, 2, 7, 4)] * 4
    )
    assert ("cache_lengths" not in inputs) == (cache is CacheStyle.NONE)


class Branching(torch.nn.Module):
    """A head that looks at its values: no graph can."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(x) if x.sum() > 0 else self.head(-x)
        return result


def test_what_cannot_be_traced_is_refused_by_name(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    sources = named_sources({"one": write_lora(tmp_path / "one", base, ("q_proj",), 2)})
    parts = load(base, *sources)
    parts.model.lm_head = Branching(parts.model.lm_head)
    with pytest.raises(
        ExportError, match=r"graph dynamic: this llama model cannot be traced as it is; got \w+: .*Fix: families proved"
    ):
        export_dynamic(parts, quick(sources, base), DType.FLOAT32, WeightStore(tmp_path))
    assert parts.model.config._attn_implementation != "xlora_export", "the model must be put back as it was"
    assert not list(tmp_path.glob("*.onnx"))


def described(rope: Mapping[str, Any] | None = None, **config: Any) -> Any:
    """As much of a base's description as `refuse_untraceable` reads."""
    sizes = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"), 8)
    settings = sizes | {"rope_parameters": rope, "attn_logit_softcapping": None} | config
    return SimpleNamespace(name="tiny", model_type="gemma2", text_config=SimpleNamespace(**settings))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_rope_is_refused(kind: str) -> None:
    wanted = rf"base tiny: rope_type '{kind}' changes with the sequence length .*; need default, linear, llama3 or yarn"
    with pytest.raises(ExportError, match=wanted):
        refuse_untraceable(described({"rope_type": kind}), Emit.PORTABLE)
    with pytest.raises(ExportError, match=wanted):  # gemma3 and others: one per kind of block
        refuse_untraceable(described({"full_attention": {"rope_type": kind}}), Emit.PORTABLE)


def test_other_ropes_pass() -> None:
    for rope in (None, {}, {"rope_type": "llama3"}, {"full_attention": {"rope_type": "default"}}):
        refuse_untraceable(described(rope), Emit.MODERN)


def test_blocks_that_are_not_plain_or_windowed_attention_are_refused() -> None:
    """Chunked attention is seen only beyond a chunk of thousands of tokens, where verification never goes."""
    refuse_untraceable(described(layer_types=["full_attention", "sliding_attention"]), Emit.PORTABLE)
    for kind in ("chunked_attention", "linear_attention"):
        with pytest.raises(ExportError, match=rf"blocks of a kind that cannot be exported; got {kind}; need full_att"):
            refuse_untraceable(described(layer_types=["full_attention", kind]), Emit.PORTABLE)


@pytest.mark.parametrize("field", ["max_position_embeddings", "num_attention_heads"])
def test_models_without_positions_or_heads_are_refused_by_name(field: str) -> None:
    with pytest.raises(ExportError, match=rf"is no decoder with attention .*; got a config without {field}"):
        refuse_untraceable(described(**{field: None}), Emit.PORTABLE)


def test_a_window_that_lives_in_the_mask_only_is_refused() -> None:
    state = CacheState([], None)
    config = SimpleNamespace(model_type="qwen2_moe", sliding_window=4096, layer_types=None)
    state.windows.add(None)
    with pytest.raises(ExportError, match=r"the sliding window of qwen2_moe .* would be lost; got sliding_window 4096"):
        require_window(config, state)
    config.layer_types = ["full_attention"]
    require_window(config, state)
    config.layer_types = ["full_attention", "sliding_attention"]
    state.windows.add(4096)
    require_window(config, state)


def test_a_trace_looks_for_the_window(tmp_path: Path) -> None:
    """Llama's attention function knows of no window, whatever a config holds."""
    model, ids = load_model(write_base(tmp_path / "base")), torch.zeros(1, 3, dtype=torch.int64)
    for window in (None, 5):
        model.config.sliding_window = window
        refused = (
            pytest.raises(ExportError, match="sliding window of llama does not reach") if window else nullcontext()
        )
        with traced_model(model, (), None, CacheStyle.NONE) as traced, torch.no_grad(), refused:
            traced(input_ids=ids, position_ids=torch.arange(3)[None], logit_index=ids)


def test_softcap_is_refused_in_modern_only() -> None:
    capped = described(attn_logit_softcapping=50.0)
    refuse_untraceable(capped, Emit.PORTABLE)
    with pytest.raises(ExportError, match=r"--emit modern: gemma2 caps its attention logits .* Fix: --emit portable"):
        refuse_untraceable(capped, Emit.MODERN)


def test_a_build_refuses_rope_before_any_weight_is_read(tmp_path: Path) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    lora = write_lora(tmp_path / "one", base, ("q_proj",), 2)
    edit_json(base / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(ExportError, match="rope_type 'dynamic' changes with the sequence length"):
        build(BuildSpec((AdapterSource(lora),), str(base), out=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


SOURCE = (AdapterSource(Path("x")),)
CONTRADICTIONS: dict[str, tuple[BuildSpec, str]] = {
    "nothing": (BuildSpec(), r"--adapters: no adapters given; need an X-LoRA folder, or NAME=DIR of LoRA folders"),
    "static without mix": (
        BuildSpec(SOURCE, modes=(Mode.STATIC,)), r"--mode static: a static graph needs a mix\. Fix: --mix math=0\.7"
    ),
    "mix without static": (
        BuildSpec(SOURCE, mix={"a": 1.0}),
        r"--mix: a mix is folded into static graphs only; got --mode dynamic\. Fix: add --mode static",
    ),
    "modern without cache": (
        BuildSpec(SOURCE, emit=Emit.MODERN, cache=CacheChoice.NONE),
        r"--cache none: the modern emit always has a K/V cache\. Fix: --emit portable",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradicting_settings_are_refused(case: str) -> None:
    spec, message = CONTRADICTIONS[case]
    with pytest.raises(ExportError, match=message):
        check_spec(spec)


def test_settings_that_agree_pass() -> None:
    check_spec(BuildSpec(SOURCE))
    check_spec(BuildSpec(gate=Path("gate")))
    check_spec(BuildSpec(SOURCE, modes=(Mode.DYNAMIC, Mode.STATIC), mix={"a": 1.0}))
    check_spec(BuildSpec(SOURCE, cache=CacheChoice.NONE))


def test_default_name_is_the_gates_or_the_bases() -> None:
    inputs: Any = SimpleNamespace(adapters=SimpleNamespace(gate=object()), base=SimpleNamespace(name="org/llama"))
    folder = AdapterSource(Path("some/xlora"))
    assert default_out(BuildSpec((folder,)), inputs) == Path("xlora-dynamic")
    assert default_out(BuildSpec((folder,), gate=Path("my/gate")), inputs) == Path("gate-dynamic")
    inputs.adapters.gate = None
    both = BuildSpec((folder,), modes=(Mode.DYNAMIC, Mode.STATIC))
    assert default_out(both, inputs) == Path("llama-dynamic-static")


def test_untying_is_told_only_where_it_happens(tmp_path: Path) -> None:
    from exporter.checkpoints import describe_base

    tied = describe_base(str(write_lively_base(tmp_path / "tied", tie_word_embeddings=True)))
    apart = describe_base(str(write_lively_base(tmp_path / "apart")))
    [note] = untying_notes(tied, {"lm_head", "model.layers.0.self_attn.q_proj"})
    assert note == (
        "model.embed_tokens and lm_head share one weight in the base and are untied here: "
        "the experts change lm_head only"
    )
    assert untying_notes(tied, {"model.layers.0.self_attn.q_proj"}) == ()
    assert untying_notes(apart, {"lm_head"}) == ()


def test_two_weights_of_one_name_are_refused() -> None:
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]), const_value=ir.tensor([1.0]))
        for name in ("p_a", "p_b")
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18})
    with pytest.raises(ir.passes.PreconditionError, match="two weights of the trace have one name"):
        NameWeightsPass({"p_a": "w", "p_b": "w"})(ir.Model(graph, ir_version=10))


def test_no_pass_sees_the_values_of_a_weight() -> None:
    """They are the base's, or memory nobody has filled: what is stored may be something else."""
    weight, constant = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]), const_value=ir.tensor([0.0]))
        for name in ("p_a", "constant")
    )
    graph = ir.Graph([], [], nodes=[], initializers=[weight, constant], opset_imports={"": 18})
    NameWeightsPass({"p_a": "w"})(ir.Model(graph, ir_version=10))
    assert graph.initializers["w"].const_value is None
    assert graph.initializers["constant"].const_value is not None
