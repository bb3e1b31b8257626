"""The loaded model, its sites and its gate: what every graph is made from and measured with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from exporter.checkpoints import BlankBase, load_base
from exporter.dynamic import head_path
from exporter.encoder import signature_of
from exporter.encoder_reference import EncoderReference
from exporter.encoder_verification import EncoderVerification
from exporter.gate import Gate, PluginGate
from exporter.graphs import parameter_count
from exporter.hot_build import hot_info, probe_adapters, with_allowed_sites
from exporter.inputs import Inputs
from exporter.model_facts import base_info, module_kinds
from exporter.quantization import Quantizer, quantizer_for
from exporter.reference import Reference
from exporter.sites import Site, SiteKind, stack
from exporter.spec import BuildSpec, HotSpec, OpChoice
from exporter.verification import Probe, Verification
from runtime.manifest import EncoderInfo, HotInfo, VerifyLevel
from runtime.signature import TOKEN_TYPE_IDS
from runtime.text import Text

FULL_UP_TO = 300_000_000  # parameters; above, `quick` is the default and weights stay mapped in verification
GATES: dict[OpChoice, type[Gate]] = {OpChoice.OPS: Gate, OpChoice.PLUGIN: PluginGate}


@dataclass(frozen=True, slots=True)
class Parts:
    """The loaded model and what its graphs are made from."""

    inputs: Inputs
    model: Any  # transformers.PreTrainedModel
    kinds: Sequence[tuple[str, SiteKind]]
    sites: tuple[Site, ...]
    gate: Gate | None
    hot: HotInfo | None = None  # where adapters are inputs: their layout
    blank: BlankBase | None = None  # the model without values, for builds that compare no numbers


def load_parts(
    inputs: Inputs, gate_op: OpChoice = OpChoice.OPS, hot: HotSpec | None = None, blank: BlankBase | None = None
) -> Parts:
    """The base in fp32, or the `blank` one; the sites and the gate."""
    model = load_base(inputs.base, torch.float32) if blank is None else blank.model
    kinds = module_kinds(inputs.base, model)
    gate = inputs.adapters.gate
    sites, experts, layout = (
        stack(inputs.adapters, kinds, model, None if blank is None else blank.read),
        len(inputs.adapters.experts),
        None,
    )
    if hot is not None:
        assert inputs.allowed is not None
        sites = with_allowed_sites(sites, inputs.allowed, kinds, inputs.base, experts)
        layout = hot_info(hot, model, sites, experts)
    return Parts(inputs, model, kinds, sites, None if gate is None else GATES[gate_op](gate, experts), layout, blank)


def quantizer_of(parts: Parts, spec: BuildSpec) -> Quantizer | None:
    """What the settings quantise of this model."""
    if spec.quantize is None:
        return None
    embedding = parts.model.get_input_embeddings()
    path = next(name for name, module in parts.model.named_modules() if module is embedding)
    return quantizer_for(spec.quantize, parts.kinds, path, head_path(parts.model))


def make_verification(parts: Parts, spec: BuildSpec, tokenizer: Text | None) -> Verification:
    """The measures for this model, at the level asked for or the default for its size."""
    size = parameter_count(parts.model)
    info = base_info(parts.inputs.base, parts.model, spec.dtype)
    common: dict[str, Any] = {
        "adapters": parts.inputs.adapters,
        "level": spec.verify or (VerifyLevel.FULL if size <= FULL_UP_TO else VerifyLevel.QUICK),
        "spec": spec,
        "tokenizer": tokenizer,
        "vocab_size": info.vocab_size,
        "max_positions": info.max_positions,
        "is_large": size > FULL_UP_TO,
    }
    encoder = parts.inputs.encoder
    if encoder is not None:
        return EncoderVerification(reference=encoder_reference(parts, encoder), info=encoder, **common)
    reference = Reference(parts.model, parts.inputs.adapters, parts.kinds)
    if parts.hot is None:
        return Verification(reference=reference, **common)
    reference.sites = [(site.path, site.kind) for site in parts.sites]
    strangers = probe_adapters(parts.hot, [expert.name for expert in parts.inputs.adapters.experts])
    probe = Probe(strangers, Reference(parts.model, strangers, parts.kinds))
    return Verification(reference=reference, hot=parts.hot, probe=probe, **common)


def encoder_reference(parts: Parts, encoder: EncoderInfo) -> EncoderReference:
    """The oracle of an encoder."""
    types = signature_of(parts.model, encoder, 0, 0, gate=False).input(TOKEN_TYPE_IDS)
    return EncoderReference(parts.model, parts.inputs.adapters, parts.kinds, encoder, has_types=types is not None)
