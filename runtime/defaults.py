"""The base's own generation settings under a request's: each field that the request leaves open is the base's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from runtime.manifest import GenerationDefaults
from runtime.sampling import Sampling, meaningless
from runtime.token_rules import TokenRules

NONE = GenerationDefaults()
CUTS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def with_defaults(sampling: Sampling, defaults: GenerationDefaults) -> Sampling:
    """The sampling with nothing left open; InputError where it sets what greedy decoding does not have.

    A temperature says whether tokens are drawn at random; without one the base's `do_sample` says it.
    """
    temperature = sampling.temperature
    if temperature is None:
        temperature = (defaults.temperature or 1.0) if defaults.do_sample else 0.0
    if temperature == 0 and sampling.is_of_random:
        raise meaningless()
    cuts = CUTS if temperature else ()
    own: dict[str, Any] = {name: _first(getattr(sampling, name), getattr(defaults, name)) for name in cuts}
    return replace(sampling, temperature=temperature, **own)


def rules_of(sampling: Sampling, defaults: GenerationDefaults, ends: Collection[int]) -> TokenRules | None:
    """What changes the logits of a request; None where nothing does."""
    rules = TokenRules(
        end_token_ids=tuple(sorted(ends)),
        sequence_bias=defaults.sequence_bias,
        repetition_penalty=_first(sampling.repetition_penalty, defaults.repetition_penalty, 1.0),
        no_repeat_ngram_size=_first(sampling.no_repeat_ngram_size, defaults.no_repeat_ngram_size, 0),
        bad_words_ids=defaults.bad_words_ids,
        min_length=defaults.min_length or 0,
        min_new_tokens=_first(sampling.min_new_tokens, defaults.min_new_tokens),
        forced_bos_token_id=defaults.forced_bos_token_id,
        forced_eos_token_ids=defaults.forced_eos_token_ids,
        remove_invalid_values=defaults.remove_invalid_values,
        exponential_decay_length_penalty=defaults.exponential_decay_length_penalty,
        suppress_tokens=_first(sampling.suppress_tokens, defaults.suppress_tokens),
        begin_suppress_tokens=defaults.begin_suppress_tokens,
    )
    return None if rules.do_nothing else rules


def most_new_tokens(defaults: GenerationDefaults, prompt: int) -> int | None:
    """How many tokens the base's config lets come after so long a prompt; None: it does not say, < 1: none."""
    if defaults.max_new_tokens is not None:
        return defaults.max_new_tokens
    return None if defaults.max_length is None else defaults.max_length - prompt


def said(defaults: GenerationDefaults) -> str:
    """What is applied, field by field."""
    found = defaults.model_dump(exclude={"not_applied"}, exclude_defaults=True)
    return ", ".join(f"{name} {_short(value)}" for name, value in found.items())


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _first(*values: Any) -> Any:
    """The first that is set."""
    return next((value for value in values if value is not None), None)
