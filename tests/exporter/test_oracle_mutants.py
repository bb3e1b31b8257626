"""Mistakes that build and oracle would share: graph and reference agree on them, PEFT's own forward does not.

Each mutant changes the reading of a checkpoint, or the loaded model, never the export. The reference is compared with
PEFT loaded by its public loader: without a mutant they are equal, with any of them they are not. `long` also builds
under each: verification passes, so nothing but the comparison with PEFT can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import exporter.checkpoints.adapter_set as adapter_set
import exporter.checkpoints.lora as lora
import exporter.parts as parts_module
from exporter.adapters import LoraDelta, Replacement
from exporter.build_bundle import build
from exporter.spec import AdapterSource
from runtime.manifest import MixInfo, Mode
from tests.exporter.checkpoint_makers import (
    make_xlora,
    write_adalora,
    write_adapter,
    write_dora,
    write_live_xlora,
    write_lora,
)
from tests.exporter.peft_models import logits_of, peft_lora
from tests.exporter.tiny_builds import load, prompt, quick, reference_of, write_lively_base

TOKENS = prompt(13)
EQUAL = 1e-5  # |d| / (1 + |logit|); measured noise is below 2e-6
SEEN = 1e-3  # what a mutant must change at least


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint, and PEFT's answer to it [T, V]."""

    base: Path
    source: AdapterSource
    expected: torch.Tensor
    is_gated: bool = False

    def apart(self) -> float:
        """How far the oracle of a build lies from PEFT: the largest |d| / (1 + |ref|)."""
        oracle = reference_of(load(self.base, self.source))
        got = (oracle.gated(TOKENS) if self.is_gated else oracle.constant([1.0], TOKENS)).logits
        return float(((got - self.expected).abs() / (1 + self.expected.abs())).max())


def make_alone(folder: Path, family: str, write: Callable[..., Path], sizes: Mapping[str, Any], **how: Any) -> Subject:
    """One adapter on a base of a family."""
    base = write_lively_base(folder / "base", family, **sizes)
    path = write(folder / "one", base, **how)
    return Subject(base, AdapterSource(path, "one"), logits_of(peft_lora(base, path), TOKENS))


def make_gated(folder: Path, **config: Any) -> Subject:
    """Three experts under a gate of two layers."""
    base = write_lively_base(folder / "base")
    paths = [write_lora(folder / str(n), base, ("q_proj", "v_proj"), 2 + n, alpha=9, seed=n) for n in range(3)]
    settings = {"layerwise_scalings": True, "xlora_depth": 2} | config
    value = settings.get("scaling_pass_value", 0.0)
    model = make_xlora(base, paths, **settings | {"scaling_pass_value": value})
    model.base_model.set_scaling_pass_value(value)
    write_live_xlora(folder / "xlora", model)
    return Subject(base, AdapterSource(folder / "xlora"), logits_of(model.eval(), TOKENS), is_gated=True)


def write_replacing(folder: Path, base: Path, **config: Any) -> Path:
    """A LoRA that also replaces weights of the base."""
    from peft import LoraConfig

    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **config)
    return write_adapter(folder, base, settings)


PATTERNS = {"targets": ("q_proj", "v_proj"), "use_rslora": True, "alpha_pattern": {"v_proj": 2}}
ODD = {"rms_norm_eps": 0.05, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "LoRA": lambda at: make_alone(at, "llama", write_lora, ODD, **PATTERNS),
    "DoRA": lambda at: make_alone(at, "llama", write_dora, {}, targets=("q_proj", "v_proj")),
    "AdaLoRA": lambda at: make_alone(at, "llama", write_adalora, {}, targets=("q_proj", "up_proj")),
    "rows": lambda at: make_alone(at, "llama", write_replacing, {}, trainable_token_indices=TOKENS[:6]),
    "head": lambda at: make_alone(at, "llama", write_replacing, {}, modules_to_save=["lm_head"]),
    "words": lambda at: make_alone(at, "gemma2", write_lora, SOFTCAPS, targets=("embed_tokens", "q_proj")),
    "window": lambda at: make_alone(at, "mistral", write_lora, {}),
    "Conv1D": lambda at: make_alone(at, "gpt2", write_lora, {}, targets=("c_attn",), fan_in_fan_out=True),
    "biases": lambda at: make_alone(at, "qwen2", write_lora, {}),
    "sharp gate": lambda at: make_gated(at, softmax_temperature=0.3, global_scaling_weight=0.4, scaling_pass_value=0.5),
    "top-k": lambda at: make_gated(at, top_k_lora=2, enable_softmax_topk=True),
}

Mutation = Callable[[pytest.MonkeyPatch], None]


def model_becomes(change: Callable[[Any], object]) -> Mutation:
    """The loaded base, of which graph and reference are made, is another."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        right = parts_module.load_base

        @torch.no_grad()
        def wrong(*arguments: Any) -> Any:
            model = right(*arguments)
            change(model)
            return model

        patch.setattr(parts_module, "load_base", wrong)

    return mutate


def gate_becomes(**changes: Any) -> Mutation:
    """Settings of the gate read as others; a callable is given the right value."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        right = adapter_set._gate_config

        def wrong(*arguments: Any) -> Any:
            config = right(*arguments)
            values = {key: new(getattr(config, key)) if callable(new) else new for key, new in changes.items()}
            return replace(config, **values)

        patch.setattr(adapter_set, "_gate_config", wrong)

    return mutate


def deltas_become(change: Callable[[LoraDelta], LoraDelta]) -> Mutation:
    """Every update is read as another."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        right = lora.delta_from_tensors
        patch.setattr(lora, "delta_from_tensors", lambda read: change(right(read)))

    return mutate


def replacements_become(change: Callable[[dict[str, Replacement]], dict[str, Replacement]]) -> Mutation:
    """What an adapter replaces is read as something else."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        right = lora.read_replacements
        patch.setattr(lora, "read_replacements", lambda *arguments: change(right(*arguments)))

    return mutate


def fields_become(**changes: Any) -> Mutation:
    """Fields of the adapter's config read as others."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        right = lora.parse_lora_config
        patch.setattr(lora, "parse_lora_config", lambda *given: right(*given).model_copy(update=changes))

    return mutate


def norms_of_default_eps(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-6


def default_rope(model: Any) -> None:
    frequencies = model.model.rotary_emb.inv_freq
    frequencies.copy_(10_000.0 ** -(torch.arange(len(frequencies)) / len(frequencies)))


def rounded_again(model: Any) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def tied_by_flag(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def blocks_exchanged(model: Any) -> None:
    """As shards read in another order would have it."""
    first, second = (dict(block.named_parameters()) for block in model.model.layers)
    for name, parameter in first.items():
        kept = parameter.clone()
        parameter.copy_(second[name])
        second[name].copy_(kept)


def turned_twice(model: Any) -> None:
    for block in model.transformer.h:
        block.attn.c_proj.weight.copy_(block.attn.c_proj.weight.T.clone())


def no_biases(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()


def set_config(name: str, value: Any) -> Mutation:
    return model_becomes(lambda model: setattr(model.config, name, value))


def unscaled_words(model: Any) -> None:
    model.model.embed_tokens.embed_scale.fill_(1.0)
    model.model.embed_tokens.scalar_embed_scale = 1.0


MUTANTS: dict[str, tuple[str, Mutation]] = {
    "alpha / r read as alpha": ("LoRA", deltas_become(lambda d: replace(d, scale=d.scale * len(d.a)))),
    "rsLoRA ignored": ("LoRA", fields_become(use_rslora=False)),
    "alpha_pattern ignored": ("LoRA", fields_become(alpha_pattern={})),
    "rms_norm_eps of the default": ("LoRA", model_becomes(norms_of_default_eps)),
    "rope_theta of the default": ("LoRA", model_becomes(default_rope)),
    "stored weights rounded again": ("LoRA", model_becomes(rounded_again)),
    "tied by flag": ("LoRA", model_becomes(tied_by_flag)),
    "shards in another order": ("LoRA", model_becomes(blocks_exchanged)),
    "DoRA's magnitude ignored": ("DoRA", deltas_become(lambda d: replace(d, magnitude=None))),
    "DoRA's update without its scale": ("DoRA", deltas_become(lambda d: replace(d, scale=1.0))),
    "AdaLoRA's scale as LoRA's": ("AdaLoRA", deltas_become(lambda d: replace(d, scale=6.0 / 2))),
    "token rows ignored": ("rows", replacements_become(lambda found: {})),
    "token rows given to the next ids": (
        "rows",
        replacements_become(lambda f: {k: replace(v, rows=(*v.rows[1:], v.rows[0])) for k, v in f.items() if v.rows}),
    ),
    "saved head ignored": ("head", replacements_become(lambda found: {})),
    "embedding scale dropped": ("words", model_becomes(unscaled_words)),
    "softcap of the logits ignored": ("words", set_config("final_logit_softcapping", None)),
    "window ignored": ("window", set_config("sliding_window", None)),
    "Conv1D turned twice": ("Conv1D", model_becomes(turned_twice)),
    "attention biases dropped": ("biases", model_becomes(no_biases)),
    "gate's temperature ignored": ("sharp gate", gate_becomes(temperature=1.0)),
    "global weight ignored": ("sharp gate", gate_becomes(global_scaling_weight=1.0)),
    "scaling pass of the default": ("sharp gate", gate_becomes(scaling_pass_value=0.0)),
    "gate columns permuted": ("sharp gate", gate_becomes(weights=lambda w: (*w[:-1], w[-1].flip(0)))),
    "top-k ignored": ("top-k", gate_becomes(top_k=None)),
    "softmax over the top k ignored": ("top-k", gate_becomes(softmax_topk=False)),
    "gate without ReLU": ("top-k", gate_becomes(relu=False)),
}


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Made once each."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            made[name] = SUBJECTS[name](tmp_path_factory.mktemp("oracle"))
        return made[name]

    return get


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_oracle_is_peft(name: str, subject_of: Callable[[str], Subject]) -> None:
    assert subject_of(name).apart() <= EQUAL


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_shared_mistake_is_seen(
    mutant: str, subject_of: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mutate = MUTANTS[mutant]
    subject = subject_of(name)
    mutate(monkeypatch)
    assert subject.apart() > SEEN


SHARED_IN_CI = ("alpha / r read as alpha", "top-k ignored")


@pytest.mark.parametrize(
    "mutant", [pytest.param(each, marks=() if each in SHARED_IN_CI else pytest.mark.long) for each in MUTANTS]
)
def test_the_mistake_is_shared(
    mutant: str, subject_of: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build under the mutant verifies: only the comparison with PEFT stands between it and the user."""
    name, mutate = MUTANTS[mutant]
    subject = subject_of(name)
    mutate(monkeypatch)
    spec = replace(quick((subject.source,), subject.base), out=tmp_path / "bundle")
    if not subject.is_gated:
        spec = replace(spec, modes=(Mode.STATIC,), mix=MixInfo(weights={"one": 1.0}))
    [report] = build(spec).manifest.reports
    assert all(check.passed for check in report.checks)
