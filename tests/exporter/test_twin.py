"""`--verify structure`: what an attention takes must be known, and a small twin of the model vouches for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import gate, gated, sites, twin
from exporter.attention import HARMLESS, CacheState, require_known
from exporter.build_bundle import build
from exporter.checkpoints import describe_base
from exporter.errors import ExportError, VerifyError
from exporter.inputs import read_inputs
from exporter.passes import lower_attention
from exporter.spec import BuildSpec, DType
from exporter.twin import needed_blocks, prove_by_twin, write_twin
from runtime.errors import InputError
from runtime.inspect import verification_of
from runtime.manifest import Emit, Mode, VerifyLevel
from tests.exporter.checkpoint_makers import write_base, write_dora, write_lora
from tests.exporter.tiny_builds import (
    named_sources,
    quick,
    write_gate,
    write_lively_base,
    write_three_experts,
)

# Keywords that attentions of transformers 5.23 are called with (`attention_interface(...)` in its modeling files).
UNKNOWN = ("s_aux", "sinks", "indices", "block_indices", "position_bias", "query", "key_padding", "alibi")
GRANITE_SWA = {"sliding_window": 64}


def gated_spec(folder: Path, family: str = "llama", **settings: Any) -> BuildSpec:
    """Three experts and a gate, at the level of structure."""
    base = write_lively_base(folder / "base", family, num_hidden_layers=1)
    experts = write_three_experts(folder, base, family, ends=False)
    gate_folder = write_gate(folder / "xlora", base, experts, softmax_temperature=0.5)
    spec = replace(quick(named_sources(experts), base), gate=gate_folder, verify=VerifyLevel.STRUCTURE)
    return replace(spec, out=folder / "bundle", **settings)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_argument_is_refused_by_name(name: str) -> None:
    require_known({name: None, "dropout": 0.0, "is_causal": True, "position_ids": torch.zeros(1, 2)})
    with pytest.raises(ExportError, match=rf"its attention takes {name}, which the exported attention does not have"):
        require_known({name: torch.ones(2)})


@pytest.mark.parametrize(("name", "value"), [("dropout", 0.1), ("is_causal", False), ("output_attentions", True)])
def test_a_harmless_argument_with_another_value_is_refused(name: str, value: object) -> None:
    assert name in HARMLESS
    with pytest.raises(ExportError, match=f"its attention takes {name}"):
        require_known({name: value})


def test_an_attention_reads_what_it_cached_and_once() -> None:
    state, key, value = CacheState((), None), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    state.update(key, value, 0)
    state.take(0, key, value)
    with pytest.raises(ExportError, match="block 0: this model calls its attention more than once"):
        state.take(0, key, value)
    state.update(key, value, 1)
    with pytest.raises(ExportError, match="block 1: this model changes keys and values after caching them"):
        state.take(1, key.clone(), value)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("granite_swa", GRANITE_SWA, "its attention takes s_aux"),
        ("diffllama", {}, "changes keys and values after caching them"),
    ],
)
@pytest.mark.parametrize("level", [VerifyLevel.STRUCTURE, VerifyLevel.QUICK])
def test_families_with_another_attention_are_refused(
    family: str, sizes: dict[str, Any], message: str, level: VerifyLevel, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", family, **sizes)
    expert = write_lora(tmp_path / "one", base)
    spec = replace(quick(named_sources({"one": expert}), base), verify=level, out=tmp_path / "bundle")
    with pytest.raises(InputError, match=message):
        build(spec)
    assert not (tmp_path / "bundle").exists()


def test_a_structure_build_carries_the_proof_of_its_twin(tmp_path: Path) -> None:
    bundle = build(gated_spec(tmp_path))
    [report] = bundle.manifest.reports
    assert (report.level, report.checks) == (VerifyLevel.STRUCTURE, ())
    assert report.twin is not None
    assert report.twin.level is VerifyLevel.QUICK
    assert {check.name for check in report.twin.checks} >= {"logits", "gate", "greedy_tokens"}
    assert all(check.passed for check in report.twin.checks)
    assert report.twin.adapters_matter > 0.1
    assert report.proof == "shapes and bytes of this model, numbers of its small twin"
    line = verification_of(bundle.manifest, "dynamic")
    assert line.startswith("NOT VERIFIED")
    assert "numbers of its small twin" in line


def scaled(cls: Any, name: str, factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """A method that gives `factor` times its own."""
    own = getattr(cls, name)

    def patched(self: Any, *inputs: Any) -> Any:
        return own(self, *inputs) * factor

    return lambda patch: patch.setattr(cls, name, patched)


def wider_window(patch: pytest.MonkeyPatch) -> None:
    own = lower_attention._Masks._visible
    patch.setattr(
        lower_attention._Masks,
        "_visible",
        lambda self, query, entries, window: own(self, query, entries, None if window is None else window + 1),
    )


def lost_scale(patch: pytest.MonkeyPatch) -> None:
    own = lower_attention.read_attention
    patch.setattr(lower_attention, "read_attention", lambda node: replace(own(node), scale=0.3))


def swapped_columns(patch: pytest.MonkeyPatch) -> None:
    own = twin.load_parts

    def swapped(*inputs: Any) -> Any:
        parts = own(*inputs)
        if parts.blank is None:  # the reference's are right
            return parts
        turned = tuple(replace(site, weights=site.weights.flip(0)) for site in parts.sites)
        return replace(parts, sites=turned)

    patch.setattr(twin, "load_parts", swapped)


def hot_temperature(patch: pytest.MonkeyPatch) -> None:
    own = gate.Gate.scalings
    patch.setattr(gate.Gate, "scalings", lambda self, logits: own(self, logits * self.config.temperature))


def no_causality(patch: pytest.MonkeyPatch) -> None:
    own, kind = lower_attention._Masks._query, lower_attention.INT64

    def next_one(self: Any, lengths: Any) -> Any:
        return self._steps.op("Add", [own(self, lengths), self._steps.integer(1)], kind)

    patch.setattr(lower_attention._Masks, "_query", next_one)


FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "gpt_neox", "mixtral",
)  # fmt: skip
MUTANTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "two experts change places": ("llama", swapped_columns),
    "window off by one": ("mistral", wider_window),
    "temperature dropped": ("llama", hot_temperature),
    "another scale": ("llama", lost_scale),
    "tokens see the next one": ("llama", no_causality),
    "factors 1 % off": ("llama", scaled(gated.Down, "factors", 1.01)),
}
DAILY = ("two experts change places", "window off by one")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DAILY else (pytest.mark.long,)) for name in MUTANTS]
)
def test_a_wrong_graph_is_refused_at_the_level_of_structure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, mutate = MUTANTS[name]
    spec = gated_spec(tmp_path, family)
    mutate(monkeypatch)
    with pytest.raises(VerifyError, match="come out wrong"):
        build(spec)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.long
def test_a_dora_without_its_scale_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_lively_base(tmp_path / "base", num_hidden_layers=1)
    expert = write_dora(tmp_path / "one", base, ("q_proj", "down_proj"))
    spec = replace(quick(named_sources({"one": expert}), base), verify=VerifyLevel.STRUCTURE, out=tmp_path / "bundle")
    own = sites._out_scale
    monkeypatch.setattr(sites, "_out_scale", lambda *inputs: torch.ones_like(own(*inputs)))
    with pytest.raises(VerifyError, match="come out wrong"):
        build(spec)


def test_blocks_of_every_kind_are_needed(tmp_path: Path) -> None:
    """Gemma 3 has one full block in six; an expert that begins at block 3 needs that one, too."""
    types = [*["sliding_attention"] * 5, "full_attention"] * 2
    base = describe_base(str(write_base(tmp_path / "gemma", "gemma3_text", num_hidden_layers=12, layer_types=types)))
    plain = write_base(tmp_path / "llama", num_hidden_layers=6)
    late = write_lora(tmp_path / "late", plain, layers_to_transform=[3, 4])
    inputs = read_inputs(quick(named_sources({"late": late}), plain))
    assert needed_blocks(base, replace(inputs.adapters, experts=())) == 6
    assert needed_blocks(inputs.base, replace(inputs.adapters, experts=())) == 2
    assert needed_blocks(inputs.base, inputs.adapters) == 4


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2", "phi3"])
def test_a_twin_is_small_and_of_the_same_modules(family: str, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"vocab_size": 1000}
    if family == "gpt2":
        wide |= {"n_embd": 128, "n_layer": 3}
    else:
        wide |= {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
    path = write_base(tmp_path / "base", family, **wide)
    base = describe_base(str(path))
    expert = write_lora(tmp_path / "one", path, {"gpt2": ("c_attn",), "phi3": ("qkv_proj",)}.get(family, ("q_proj",)))
    inputs = read_inputs(quick(named_sources({"one": expert}), path))
    small = write_twin(base, inputs.adapters, tmp_path / "twin")
    assert small.hidden_size < base.hidden_size
    assert small.text_config.vocab_size == twin.VOCABULARY
    assert all(base.modules[name].type_name == info.type_name for name, info in small.modules.items())
    assert small.text_config.num_hidden_layers == 2
    window = getattr(small.text_config, "sliding_window", None)
    assert window is None or window <= twin.WINDOW


def test_a_family_without_a_twin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = gated_spec(tmp_path)
    monkeypatch.setattr(twin, "_save", lambda *_: (_ for _ in ()).throw(ValueError("no such sizes")))
    with pytest.raises(ExportError, match=r"no small twin of this llama model.*no such sizes.*--verify quick"):
        build(spec)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"emit": Emit.MODERN}, {"dtype": DType.FLOAT16}, {"modes": (Mode.STATIC,)}])
def test_every_family_passes_by_its_twin(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    if family == "gemma2" and settings.get("emit"):
        pytest.skip("softcap has no modern form")
    base = write_lively_base(tmp_path / "base", family)
    experts = write_three_experts(tmp_path, base, family)
    is_static = Mode.STATIC in settings.get("modes", ())
    spec = replace(
        quick(named_sources(experts), base), verify=VerifyLevel.STRUCTURE,
        gate=None if is_static else write_gate(tmp_path / "xlora", base, experts),
        mix={"math": 0.7, "code": 0.3} if is_static else None, **settings,
    )  # fmt: skip
    for report in prove_by_twin(read_inputs(spec), spec).values():
        assert report.adapters_matter > 0.1
