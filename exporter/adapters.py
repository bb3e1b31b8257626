"""The normalised form of adapters: what `checkpoints` produces and everything later consumes. No foreign keys here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import torch

from runtime.manifest import AdapterKind, TopkSoftmax


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """One expert's update of one module: delta(x) = scale * (x aT) bT.

    Linear: a [r, in], b [out, r]. Embedding: a [r, vocab], b [dim, r], looked up by token id.
    `scale` is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (PEFT LoraLayer.update_layer). AdaLoRA: a holds the
    singular values, scale is lora_alpha / (init_r + 1e-5).
    DoRA: `magnitude` [out] (embedding: [dim]) is the length each output's weights get, W' = m * (W + delta) / norm.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Replacement:
    """New values of one weight of the base: of all of it, or of the `rows` (token ids) of an embedding or head."""

    values: torch.Tensor
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Expert:
    """One adapter: our name, and its deltas by Hugging Face module path ("model.layers.0.self_attn.q_proj").

    `replacements` by parameter name ("lm_head.weight"): not linear in the expert's weight, so for static builds only.
    """

    name: str
    deltas: Mapping[str, LoraDelta]
    key: str  # the gate config's key ("0".."n-1" in PEFT), or the name without a gate
    folder: Path
    kind: AdapterKind = AdapterKind.LORA
    replacements: Mapping[str, Replacement] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GateConfig:
    """The classifier and its rules (PEFT XLoraConfig, XLoraClassifier). Tensors are fp32.

    `weights[i]` [out_i, in_i] and `biases[i]` [out_i] (None without bias) are the Linear layers in order, with ReLU
    between them when `relu`. The last has n_sites * E outputs (layerwise: index = site * E + expert) or E.
    """

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    relu: bool
    layerwise: bool
    softmax: bool
    temperature: float
    top_k: int | None
    softmax_topk: bool
    topk_softmax: TopkSoftmax
    scaling_pass_value: float
    global_scaling_weight: float


class TiedEnds(StrEnum):
    """What ensure_weight_tying made one tensor for embedding and head, in a base that config.json ties."""

    SAVED = "modules_to_save"
    LORA = "LoRA"
    ROWS = "trainable_token_indices"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one part of the set was read from, and what that checkpoint says of its base.

    `is_target(path)` is the checkpoint's own rule for which modules it adapts; None where it states none.
    `is_saved(path)` tells which modules of the base it replaces as a whole.
    """

    role: str  # gate | expert:NAME, as in SourceInfo
    folder: Path
    files: tuple[Path, ...]
    base_name: str | None = None
    is_target: Callable[[str], bool] | None = None
    is_saved: Callable[[str], bool] = lambda _: False
    shared_rows: tuple[str, ...] = ()  # modules whose new rows PEFT saved with another module's
    tied_ends: TiedEnds | None = None


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """The experts in gate column order, and the gate if there is one."""

    experts: tuple[Expert, ...]
    gate: GateConfig | None
    notes: tuple[str, ...] = ()  # what was repaired, renamed or ignored; printed to the user
    origins: tuple[Origin, ...] = ()  # empty for a set made by hand
