"""Loading the base's weights through transformers' loader: safetensors only, no code, nothing left random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from exporter.checkpoints.base import BaseDescription
from exporter.checkpoints.task import is_unused_head, model_class
from exporter.checkpoints.weights_file import is_finite
from exporter.errors import ExportError
from runtime.adapter_folder.files import shown_path
from runtime.adapter_folder.problems import listed
from runtime.errors import InputError, raise_all


def load_base(base: BaseDescription, dtype: torch.dtype) -> Any:
    """The base model in eval mode without gradients; refuses missing, unused, misshapen and non-finite weights."""
    with loading(base):
        model, info = model_class(base.task).from_pretrained(
            base.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True, low_cpu_mem_usage=True, **base.options,
        )  # fmt: skip
    return as_loaded(model, info, base, _value_problems(model, dtype))


@contextmanager
def loading(base: BaseDescription) -> Iterator[None]:
    """Whatever transformers' loader raises on damaged files becomes one error that names the base."""
    try:
        yield
    except Exception as error:  # the loader raises anything
        got = f"{type(error).__name__}: {str(error)[:300]}"
        raise ExportError("the base could not be loaded", where=shown_path(base.folder), got=got) from error


def as_loaded(model: Any, info: dict[str, Any], base: BaseDescription, problems: Iterable[InputError] = ()) -> Any:
    """What the loader made, ready to be traced; refused where it only warned, or with these problems."""
    raise_all(shown_path(base.folder), [*_loading_problems(info, base), *problems])
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def _loading_problems(info: dict[str, Any], base: BaseDescription) -> list[InputError]:
    """What transformers only warns of: it would leave such weights random."""
    problems: list[InputError] = []
    for field, what in (
        ("missing_keys", "weights are missing from the base's files"),
        ("unexpected_keys", "weights in the base's files belong to no module"),
        ("mismatched_keys", "weights of the base have the wrong shape"),
        ("error_msgs", "the base could not be read"),
    ):
        found = [str(name) for name in info.get(field) or ()]
        if field == "unexpected_keys":
            found = [name for name in found if not is_unused_head(name, base.task)]
        if names := sorted(found):
            problems.append(
                ExportError(what, where=shown_path(base.folder), got=listed(names), fix="check config.json and files")
            )
    return problems


def _value_problems(model: torch.nn.Module, dtype: torch.dtype) -> list[InputError]:
    """NaN and infinities, in the file or by rounding to `dtype`."""
    bad = [name for name, value in model.named_parameters() if value.is_floating_point() and not is_finite(value)]
    if not bad:
        return []
    fix = "build with --dtype bfloat16 or float32" if dtype is torch.float16 else "use an undamaged base"
    return [ExportError(f"weights of the base are not finite as {dtype}", got=listed(bad), fix=fix, code="E_VALUE")]
