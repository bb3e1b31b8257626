"""Run a bundle: `from runtime import load, complete`. No torch, transformers, peft or onnx; engines load late."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.decode import Decode as Decode
    from runtime.decode import DecodeMode as DecodeMode
    from runtime.decode import Divergence as Divergence
    from runtime.decode import Freeze as Freeze
    from runtime.encode import Classification as Classification
    from runtime.encode import EncodeOptions as EncodeOptions
    from runtime.encode import Encoder as Encoder
    from runtime.encode import Variant as Variant
    from runtime.encode import classify as classify
    from runtime.encode import embed as embed
    from runtime.encode import load_encoder as load_encoder
    from runtime.encoder_session import EncodedText as EncodedText
    from runtime.errors import InputError as InputError
    from runtime.errors import MachineError as MachineError
    from runtime.errors import NumericError as NumericError
    from runtime.errors import UserError as UserError
    from runtime.generate import complete as complete
    from runtime.model import Model as Model
    from runtime.model import load as load
    from runtime.prompts import GenerateOptions as GenerateOptions
    from runtime.prompts import Routed as Routed
    from runtime.request import Completion as Completion
    from runtime.request import FinishReason as FinishReason
    from runtime.request import Timings as Timings
    from runtime.request import TokenEvent as TokenEvent
    from runtime.sampling import Sampling as Sampling
    from runtime.scheduler import SchedulerOptions as SchedulerOptions
    from runtime.serving import Answer as Answer
    from runtime.serving import Serving as Serving

# Each name is imported on first use, so that `import runtime` costs nothing.
# `generate` is `runtime.generate.generate`: a package cannot give one name to a module and a function.
_HOMES = {
    name: module
    for module, names in {
        "runtime.decode": ("Decode", "DecodeMode", "Divergence", "Freeze"),
        "runtime.encode": (
            "Classification",
            "Encoder",
            "EncodeOptions",
            "Variant",
            "classify",
            "embed",
            "load_encoder",
        ),
        "runtime.encoder_session": ("EncodedText",),
        "runtime.errors": ("InputError", "MachineError", "NumericError", "UserError"),
        "runtime.generate": ("complete",),
        "runtime.model": ("Model", "load"),
        "runtime.prompts": ("GenerateOptions", "Routed"),
        "runtime.request": ("Completion", "FinishReason", "Timings", "TokenEvent"),
        "runtime.sampling": ("Sampling",),
        "runtime.scheduler": ("SchedulerOptions",),
        "runtime.serving": ("Answer", "Serving"),
    }.items()
    for name in names
}


def __dir__() -> list[str]:
    return sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
