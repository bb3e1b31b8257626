"""The base's own generation settings, as transformers loads them: what changes tokens goes into the manifest."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import GenerationConfig, PreTrainedModel

from exporter.errors import ExportError
from runtime.manifest import GenerationDefaults

FILE = "generation_config.json"
# What our runtime does not do although tokens depend on it, with the values that change nothing.
NOT_APPLIED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "num_return_sequences": (1,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "top_h": (),
    "token_healing": (False,),
    "max_time": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "is_assistant": (False,),
}
# Known to transformers, and of no effect on the tokens of one prompt without beams or an assistant.
HARMLESS = frozenset(GenerationConfig().to_dict()) | {"transformers_version", "_from_model_config"}
SAME_NAME = (
    "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "forced_bos_token_id", "min_length", "min_new_tokens", "max_length", "max_new_tokens",
    "remove_invalid_values",
)  # fmt: skip
NO_CHANGE: Mapping[str, tuple[Any, ...]] = {
    "top_k": (0,),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (),  # 0 takes the place of min_length
    "remove_invalid_values": (False,),
}
FLOATS = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty")
DRAWN = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
TRANSFORMERS_TOP_K = 50  # where a config samples and names no top_k


def generation_defaults(model: PreTrainedModel, folder: Path | None = None) -> GenerationDefaults | None:
    """What `model.generation_config` says; None where it changes no token.

    Raises ExportError for what transformers' `generate` would refuse (its own logits processors are asked), and for
    what a manifest cannot hold. `folder`: the base's, to see a generate function of its own.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return None
    _require_usable(model, config)
    try:
        found = GenerationDefaults.model_validate(_kept(config) | {"not_applied": _not_applied(config, folder)})
    except (ValidationError, TypeError, ValueError) as error:
        raise _refused(str(error)) from error
    vocab = model.get_output_embeddings().weight.shape[0]
    forced = (*found.forced_eos_token_ids, *_ids(found.forced_bos_token_id))
    if strange := [token for token in forced if not 0 <= token < vocab]:  # seen by transformers only when it is forced
        raise _refused(f"forced tokens {strange} of a vocabulary of {vocab}")
    return None if found == GenerationDefaults() else found


def generation_notes(defaults: GenerationDefaults | None) -> tuple[str, ...]:
    """A line where something of the base's settings cannot be applied."""
    if defaults is None or not defaults.not_applied:
        return ()
    named = ", ".join(f"{name}={value}"[:80] for name, value in sorted(defaults.not_applied.items()))
    return (f"the base's generation config sets what the runtime does not apply: {named}",)


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The end tokens at which transformers' `generate` stops: those of the generation config, one, several or none."""
    config = getattr(model, "generation_config", None)
    return tuple(sorted(set(_ids(None if config is None else config.eos_token_id))))


def _kept(config: GenerationConfig) -> dict[str, Any]:
    """The fields of GenerationDefaults."""
    samples = config.do_sample is True
    kept = {name: _value(config, name) for name in SAME_NAME}
    if samples and config.top_k is None:
        kept["top_k"] = TRANSFORMERS_TOP_K
    if kept["top_p"] is not None:
        kept["top_p"] = max(kept["top_p"], 1e-12)  # 0 keeps the likeliest, as transformers does
    decay = config.exponential_decay_length_penalty
    return {name: value for name, value in kept.items() if value is not None} | {
        "do_sample": samples,
        "temperature": (1.0 if config.temperature is None else float(config.temperature)) if samples else None,
        "forced_eos_token_ids": _ids(config.forced_eos_token_id),
        "suppress_tokens": _ids(config.suppress_tokens),
        "begin_suppress_tokens": _ids(config.begin_suppress_tokens),
        "bad_words_ids": tuple(tuple(word) for word in config.bad_words_ids or ()),
        "sequence_bias": tuple((tuple(ids), bias) for ids, bias in _pairs(config.sequence_bias)),
        "exponential_decay_length_penalty": None if decay is None else (decay[0], float(decay[1])),
        "stop_strings": _texts(config.stop_strings),
    }


def _value(config: GenerationConfig, name: str) -> Any:
    """A field, None where it changes nothing."""
    value = getattr(config, name)
    if value is None or value in NO_CHANGE.get(name, ()):
        return None
    if name in DRAWN and config.do_sample is not True and not _is_drawn_from(name, value):
        return None  # transformers never looks at it, and it could not be used
    return float(value) if name in FLOATS else value


def _is_drawn_from(name: str, value: Any) -> bool:
    is_number = isinstance(value, int if name == "top_k" else int | float)
    return is_number and (value >= 1 if name == "top_k" else 0 <= value <= 1)


def _not_applied(config: GenerationConfig, folder: Path | None) -> dict[str, str]:
    """Field -> value of what changes tokens and is not done, and of what transformers does not know either."""
    values = config.to_dict()
    unknown = {name: value for name, value in values.items() if name not in HARMLESS}
    named = {name: values.get(name) for name in NOT_APPLIED if values.get(name) not in (None, *NOT_APPLIED[name])}
    found = {name: json.dumps(value, default=str, sort_keys=True) for name, value in (unknown | named).items()}
    if folder is not None and (folder / "custom_generate").is_dir():
        found["custom_generate"] = '"code of the base that is never run"'
    return dict(sorted(found.items()))


def _require_usable(model: PreTrainedModel, config: GenerationConfig) -> None:
    """Let transformers make its processors of this config and run them once, on logits of zeros [1, V]."""
    settled = copy.deepcopy(config)
    settled.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    settled.guidance_scale = settled.watermarking_config = None  # these need the model itself
    text = torch.zeros(1, 2, dtype=torch.long)
    try:
        if settled.max_new_tokens is not None:
            settled.max_length = settled.max_new_tokens + 2
        model._prepare_special_tokens(settled, device="cpu")
        processors = model._get_logits_processor(settled, input_ids_seq_length=2, encoder_input_ids=text, device="cpu")
        processors(text, torch.zeros(1, model.get_output_embeddings().weight.shape[0]))
    except Exception as error:  # transformers raises anything
        raise _refused(f"{type(error).__name__}: {error}") from error


def _refused(got: str) -> ExportError:
    return ExportError(
        "the base's generation settings cannot be used, not by transformers' generate either",
        where=FILE, got=" ".join(got.split())[:300], fix="correct the field, or remove it",
    )  # fmt: skip


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _pairs(value: Any) -> list[tuple[Any, float]]:
    """Sequence biases, as JSON has them in a list or Python in a dict."""
    return list(value.items()) if isinstance(value, dict) else [(ids, bias) for ids, bias in value or ()]
