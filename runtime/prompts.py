"""What is asked: prompts and options, checked at once, as requests that each know the way they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from runtime.adapter_folder.problems import gathering
from runtime.adapter_pool import Generation
from runtime.asked import plain, settle, settled
from runtime.decode import Decode, DecodeMode, decode_from_text
from runtime.defaults import NONE, most_new_tokens, rules_of, with_defaults
from runtime.errors import InputError, raise_all
from runtime.ladder import is_gated
from runtime.manifest import GenerationDefaults
from runtime.mix_file import mix_of
from runtime.model import Model
from runtime.request import Limits, Request
from runtime.routing import Columns, Mix, Route, route_for
from runtime.sampling import Sampler, Sampling
from runtime.scheduler import can_schedule
from runtime.session import SlotSession, StepLimits
from runtime.signature import CacheStyle
from runtime.text import TextStream

DEFAULT_NEW_TOKENS = 128

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Routed:
    """A prompt with a variant or a mix of its own, where the options' do not hold."""

    prompt: Prompt
    variant: str | None = None
    mix: Mix | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", mix_of(self.mix))
        object.__setattr__(self, "variant", settled("variant", self.variant, str | None))


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How to generate: under the bundle's gate, as the base's generation config says, greedily where it is silent."""

    max_new_tokens: int | None = None  # None: the base's, else 128, or as many as the model's positions allow
    sampling: Sampling = field(default_factory=Sampling)
    variant: str | None = None  # a variant of the bundle, by name
    mix: Mix | None = None  # or fixed scalings by expert name, {} for the base model; neither: the graph's gate
    stop: tuple[str, ...] = ()  # texts that end a request, or one; they are left out of its text
    stop_token_ids: tuple[int, ...] = ()  # besides the model's end tokens
    batch_size: int = 16  # prompts that run together; as one ends the next takes its place
    kv_budget: int | None = None  # bytes of K/V; prompts beyond it wait
    decode: str | Decode = DecodeMode.AUTO.value  # one of docs/decoding.md; of rows under the gate
    measure_frozen: bool = False  # how far frozen (or folded) scalings are from exact, once a batch has ended
    defaults: bool = True  # the base's generation config holds where nothing else is said; False: none of it

    def __post_init__(self) -> None:
        stop: object = self.stop
        if isinstance(stop, str):
            object.__setattr__(self, "stop", (stop,))
        object.__setattr__(self, "mix", mix_of(self.mix))
        settle(self)
        problems = []
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(InputError("max_new_tokens", got=str(self.max_new_tokens), need="at least 1"))
        if "" in self.stop:
            problems.append(InputError("a stop string is empty", need="at least one character"))
        if self.batch_size < 1:
            problems.append(InputError("batch_size", got=str(self.batch_size), need="at least 1"))
        if self.variant is not None and self.mix is not None:
            problems.append(InputError("a variant has its own mix", got="a variant and a mix", need="one of them"))
        if self.kv_budget is not None and self.kv_budget < 1:
            problems.append(InputError("kv_budget", got=str(self.kv_budget), need="at least 1"))
        with gathering(problems):
            decode = decode_of(self)
            if self.kv_budget is not None and not can_schedule(decode):
                problems.append(
                    InputError(f"decode {decode.mode} knows no K/V budget", got="kv_budget", fix="leave it out")
                )
        raise_all("options", problems)


@dataclass(frozen=True, slots=True)
class Way:
    """How one prompt runs."""

    variant: str | None
    route: Route
    session: SlotSession

    @property
    def is_gated(self) -> bool:
        """Whether there is a second pass to save."""
        return is_gated(self.session, [self.route.routing])


def requests_of(
    model: Model, prompts: Sequence[Prompt | Routed], options: GenerateOptions, generation: Generation | None
) -> tuple[list[Request], list[Way]]:
    """Each prompt as a request, on its own way where it has one, else the options'; all that is wrong, together."""
    asked = [each if isinstance(each, Routed) else Routed(each) for each in prompts]
    own = [each.variant is not None or each.mix is not None for each in asked]
    loaded = generation.columns if generation else None
    sampling, defaults = with_defaults(options.sampling, defaults_of(model, options)), defaults_of(model, options)
    options = replace(options, sampling=sampling)
    unknown = [token for token in sampling.suppress_tokens or () if not 0 <= token < model.vocab_size]
    if unknown:
        raise InputError("suppress_tokens", got=str(unknown[:8]), need=f"0..{model.vocab_size - 1}", code="E_SAMPLING")
    requests: list[Request] = []
    ways: list[Way] = []
    default: Way | None = None
    problems: list[InputError] = []
    if options.stop and model.text is None:
        problems.append(InputError("stop strings need a tokenizer, this bundle has none", fix="use stop token ids"))
    if not all(own):
        try:
            default = way_of(model, options.variant, options.mix, loaded)
        except InputError as error:  # of no prompt: it is said once
            problems.append(error)
    for number, (each, has_own) in enumerate(zip(asked, own, strict=True)):
        found: list[InputError] = []
        way = None if has_own else default
        if has_own:
            with gathering(found):
                way = way_of(model, each.variant, each.mix, loaded)
        with gathering(found):
            ids = _ids(model, each.prompt)
            if way is not None:  # else its limits are not known
                requests.append(_request(model, number, ids, way, options, defaults))
                ways.append(way)
        problems += [in_prompt(number, problem) for problem in found]
    if options.kv_budget is not None and any(way.session.signature.cache_style is CacheStyle.NONE for way in ways):
        problems.append(InputError("this graph keeps no K/V cache", got="kv_budget", fix="leave it out"))
    raise_all("prompts", problems)
    return requests, ways


def way_of(model: Model, variant: str | None, mix: Mix | None, loaded: Columns | None) -> Way:
    """The way of a variant or a mix; of neither, that of the graph's gate."""
    route = route_for(model.manifest, model.graph, variant, mix, loaded)
    return Way(variant, route, model.session_of(route.graph))


def decode_of(options: GenerateOptions) -> Decode:
    """How gated rows are decoded; InputError where its text says nothing."""
    return options.decode if isinstance(options.decode, Decode) else decode_from_text(options.decode)


def in_prompt(number: int, error: InputError) -> InputError:
    """The same error, where it is."""
    return InputError(str(error), where=f"prompt {number + 1}", code=error.code)


def defaults_of(model: Model, options: GenerateOptions) -> GenerationDefaults:
    """The base's settings that these options leave in force."""
    return (model.manifest.generation or NONE) if options.defaults else NONE


def _request(
    model: Model, number: int, ids: Sequence[int], way: Way, options: GenerateOptions, defaults: GenerationDefaults
) -> Request:
    limits = Limits(
        _new_tokens(len(ids), way.session.limits, options.max_new_tokens, most_new_tokens(defaults, len(ids))),
        model.end_token_ids | frozenset(options.stop_token_ids),
        options.stop or (defaults.stop_strings if model.text else ()),
    )
    stream = TextStream(model.text) if model.text else None
    rules = rules_of(options.sampling, defaults, model.end_token_ids)
    return Request(number, ids, limits, Sampler(options.sampling), stream, way.variant, rules)


def _ids(model: Model, prompt: Prompt) -> Sequence[int]:
    """A prompt's token ids, each within the vocabulary."""
    if isinstance(prompt, str):
        if model.text is None:
            raise InputError("this bundle has no tokenizer", got="text", need="token ids", fix="use --prompt-ids")
        return _known_ids(model, model.text.encode(prompt))
    if isinstance(prompt, bytes | bytearray | Mapping | Set) or not isinstance(prompt, Iterable):
        got = f"{type(prompt).__name__} {prompt!a}"[:80]
        raise InputError("the prompt", got=got, need="a text, or a list of token ids")
    return _known_ids(model, settled("token ids", [plain(token) for token in prompt], list[int]))


def _known_ids(model: Model, prompt: Sequence[int]) -> Sequence[int]:
    if not prompt:
        raise InputError("the prompt is empty", need="at least one token")
    strange = [token for token in prompt if not 0 <= token < model.vocab_size]
    if strange:
        raise InputError("unknown token ids", got=str(strange[:8]), need=f"0..{model.vocab_size - 1}")
    return prompt


def _new_tokens(prompt: int, limits: StepLimits, wanted: int | None, default: int | None = None) -> int:
    """How many tokens may come: the last one is never fed back, so it needs no position. `default`: the base's."""
    room = limits.positions - prompt + 1
    if room < 1 or (wanted or 0) > room:
        raise InputError(
            "too long for the engine's context" if limits.fix else "too long for the model's positions",
            got=f"{prompt} prompt tokens" + (f" and {wanted} new ones" if wanted else ""),
            need=f"prompt + new tokens <= {limits.positions + 1}",
            fix=limits.fix,
            code="E_POSITIONS",
        )
    if wanted is None and default is not None and default < 1:
        raise InputError(
            "the prompt is as long as the base's max_length",
            got=f"{prompt} prompt tokens", need=f"fewer than {prompt + default}", fix="give max_new_tokens",
        )  # fmt: skip
    return min(room, default or DEFAULT_NEW_TOKENS) if wanted is None else wanted
