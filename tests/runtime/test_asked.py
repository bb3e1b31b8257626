"""Whatever type a Python caller gives: one InputError with the field's name, or the plain meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import EncodeOptions, GenerateOptions, InputError, Routed, Sampling, SchedulerOptions, complete, load
from tests.runtime.tiny_bundles import tiny_bundle

ODD: list[Any] = ["x", b"x", object(), {"a": "b"}, [None], {1, 2}, 3.5, float("nan"), lambda: 0, Path("x"), np.ones(2)]
FIELDS: dict[type, list[str]] = {
    GenerateOptions: ["max_new_tokens", "sampling", "batch_size", "kv_budget", "stop_token_ids"],
    Sampling: ["temperature", "top_k", "top_p", "seed"],
    SchedulerOptions: ["rows", "kv_budget", "chunk_tokens", "decode"],
    EncodeOptions: ["batch_size"],
}
CASES = [(kind, name, number) for kind, names in FIELDS.items() for name in names for number in range(len(ODD))]


@pytest.mark.parametrize(("kind", "name", "number"), CASES)
def test_another_type_is_one_error_by_its_field(kind: type, name: str, number: int) -> None:
    if isinstance(ODD[number], float) and name in ("temperature", "top_p") and ODD[number] == 3.5:
        pytest.skip("is a number")
    if name == "stop_token_ids" and isinstance(ODD[number], set | np.ndarray):
        pytest.skip("holds numbers")
    with pytest.raises(InputError, match=name):
        kind(**{name: ODD[number]})


@pytest.mark.parametrize("mix", ["a", "a=b", 5, [1], {"a": "x"}, {1: 1.0}, {"a": None}, b"a=1"])
@pytest.mark.parametrize("kind", [GenerateOptions, EncodeOptions, lambda mix: Routed([1], mix=mix)])
def test_what_is_no_mix_is_refused(kind: Any, mix: Any) -> None:
    with pytest.raises(InputError):
        kind(mix=mix)


def test_plain_meanings_are_taken() -> None:
    assert GenerateOptions(stop="x").stop == ("x",)  # type: ignore[arg-type]
    assert GenerateOptions(mix="base").mix.weights == {}  # type: ignore[arg-type, union-attr]
    assert GenerateOptions(mix="a=0.5").mix.weights == {"a": 0.5}  # type: ignore[arg-type, union-attr]
    assert GenerateOptions(max_new_tokens=np.int64(4), stop_token_ids=[1]).max_new_tokens == 4  # type: ignore[arg-type]
    assert Sampling(np.float32(0.5), np.int32(3)).top_k == 3  # type: ignore[arg-type]


def test_prompts_of_any_type(tmp_path: Path) -> None:
    odd: list[Any] = [None, 5, "x", b"x", {"role": "user"}, [None], [5], [{"role": "user", "content": "x"}], [b"x"]]
    odd += [[["x"]], [[1.5]], [{1}], [[None]], [object()]]
    with load(str(tiny_bundle(tmp_path / "b", end=()))) as model:
        for prompts in odd:
            with pytest.raises(InputError):
                complete(model, prompts)
        for options in ("x", {"max_new_tokens": 2}, 5):
            with pytest.raises(InputError, match="options"):
                complete(model, [[1]], options)  # type: ignore[arg-type]
        two = GenerateOptions(max_new_tokens=2)
        assert complete(model, [np.array([5, 6])], two)
        assert complete(model, ([5, 6],), two)


@pytest.mark.parametrize("name", ["threads", "graph", "variant", "backend", "provider", "max_adapter_bytes"])
def test_load_refuses_other_types(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=name):
        load(tmp_path, **{name: [None]})
    with pytest.raises(InputError, match="path"):
        load(None)  # type: ignore[arg-type]
