"""DoRA, AdaLoRA and replaced weights: one clear error for each way a file or config can be wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exporter.adapters import AdapterSet
from exporter.checkpoints import check_against_base, describe_base, read_adapters
from exporter.spec import AdapterSource, CacheChoice
from runtime.errors import UserError
from runtime.manifest import AdapterKind
from tests.exporter.checkpoint_makers import (
    edit_json,
    edit_tensors,
    write_adalora,
    write_adapter,
    write_base,
    write_dora,
    write_lora,
)
from tests.exporter.tiny_builds import write_gate

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
PRUNED = {"model.layers.0.self_attn.q_proj": [True, False, True, False], "model.layers.0.mlp.up_proj": [False] * 4}
Tensors = dict[str, torch.Tensor]


def read(folder: Path, gate: Path | None = None) -> AdapterSet:
    return read_adapters([AdapterSource(folder)], gate, topk_softmax=None, cache=CacheChoice.KV)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, dora, ada, saved: good, never edited."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("kinds")
    base = write_base(folder / "base", num_hidden_layers=1)
    write_dora(folder / "dora", base, ("q_proj", "embed_tokens"))
    write_adalora(folder / "ada", base, ("q_proj", "up_proj", "v_proj"), kept=PRUNED)
    write_lora(folder / "lora", base)
    saved = {"modules_to_save": ["lm_head", "norm"], "trainable_token_indices": [3, 9]}
    write_adapter(folder / "saved", base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **saved))
    return folder


@pytest.fixture
def copied(tmp_path: Path, root: Path) -> Callable[[str], Path]:
    """A fresh copy of a good adapter, for one test to spoil."""
    return lambda name: Path(shutil.copytree(root / name, tmp_path / name))


def test_adalora_is_read_as_a_plain_lora(root: Path) -> None:
    [expert] = read(root / "ada").experts
    stored = load_file(root / "ada" / WEIGHTS)
    assert expert.kind is AdapterKind.ADALORA
    assert {path.rpartition(".")[2]: delta.a.shape[0] for path, delta in expert.deltas.items()} == {
        "q_proj": 2, "v_proj": 4,
    }  # fmt: skip
    delta = expert.deltas["model.layers.0.self_attn.q_proj"]
    assert torch.equal(delta.a, stored[f"{Q}.lora_A"] * stored[f"{Q}.lora_E"])
    assert delta.scale == pytest.approx(6 / (4 + 1e-5), rel=1e-12), "init_r, not the kept rank"
    check_against_base(read(root / "ada"), describe_base(str(root / "base")))


def test_dora_is_read_with_its_magnitudes(root: Path) -> None:
    [expert] = read(root / "dora").experts
    assert expert.kind is AdapterKind.DORA
    assert {
        path: tuple(delta.magnitude.shape) for path, delta in expert.deltas.items() if delta.magnitude is not None
    } == {
        "model.layers.0.self_attn.q_proj": (32,),
        "model.embed_tokens": (32,),
    }
    check_against_base(read(root / "dora"), describe_base(str(root / "base")))


def drop(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(key)


def put(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: change(tensors[key]).contiguous()})


def bad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().index_fill(0, torch.tensor([1]), torch.nan).reshape(tensor.shape)


EMBED = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head.weight"
ROWS = f"{EMBED}.token_adapter.trainable_tokens_delta"
TENSORS: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("dora", drop(f"{Q}.lora_magnitude_vector"), "q_proj has no complete set of dora tensors"),
    ("dora", put(f"{Q}.lora_magnitude_vector", lambda t: t[:-1]), r"wrong shape; got \[31\]; need \[32\]"),
    ("dora", put(f"{Q}.lora_magnitude_vector", lambda t: t[None]), "magnitude_vector has the wrong shape"),
    ("dora", put(f"{Q}.lora_magnitude_vector", bad), "magnitude_vector holds NaN"),
    ("dora", put(f"{Q}.lora_magnitude_vector", lambda t: t.long()), "magnitude_vector is not of a float dtype"),
    ("dora", put(f"{EMBED}.lora_magnitude_vector", lambda t: t.repeat(2)), r"wrong shape; got \[64\]; need \[32\]"),
    ("ada", drop(f"{Q}.lora_E"), "q_proj has no complete set of adalora tensors"),
    ("ada", put(f"{Q}.lora_E", lambda t: t.flatten()), r"lora_E has the wrong shape; got \[2\]; need \[2, 1\]"),
    ("ada", put(f"{Q}.lora_E", bad), "lora_E holds NaN"),
    ("ada", put(f"{Q}.lora_A", lambda t: t[:1]), r"lora_A has the wrong shape; got \[1, 32\]; need \[2, in\]: rank 2"),
    ("ada", put(f"{Q}.lora_B", lambda t: t[:, :1]), "lora_B has the wrong shape"),
    ("ada", lambda t: [t.pop(key) for key in list(t) if "mlp" in key], "rank_pattern .* names modules without tensors"),
    ("saved", drop(HEAD), "1 weights of modules_to_save have no tensors; got lm_head.weight"),
    ("saved", drop(ROWS), "trainable_token_indices are set, but their rows are not in the file"),
    ("saved", put(HEAD, lambda t: t[:-1]), r"lm_head.weight does not fit the base; got \[63, 32\]; need \[64, 32\]"),
    ("saved", put(HEAD, bad), "lm_head.weight holds NaN"),
    ("saved", put(HEAD, lambda t: t.long()), "lm_head.weight is not of a float dtype"),
    ("saved", put(ROWS, lambda t: t[:1]), "trainable_tokens_delta does not fit trainable_token_indices"),
    ("saved", put(ROWS, lambda t: t[:, :5]), r"the new model.embed_tokens.weight does not fit the base; got \[2, 5\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), TENSORS, ids=[case[2][:50] for case in TENSORS])
def test_wrong_tensors_are_refused(
    copied: Callable[[str], Path], root: Path, name: str, change: Callable[[Tensors], object], message: str
) -> None:
    folder = copied(name)
    base = describe_base(str(root / "base"))
    check_against_base(read(folder), base)
    edit_tensors(folder / WEIGHTS, change)
    with pytest.raises(UserError, match=message) as caught:
        check_against_base(read(folder), base)
    assert str(folder) in str(caught.value)


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("dora", {"use_dora": False}, "DoRA's magnitudes, but use_dora is not set"),
    ("dora", {"lora_bias": True}, "lora_bias = True cannot be exported"),
    ("dora", {"use_qalora": True}, "QALoRA"),
    ("dora", {"peft_type": "ADALORA"}, "use_dora = True cannot be exported: PEFT has no DoRA for AdaLoRA"),
    ("ada", {"peft_type": "LORA", "rank_pattern": None, "init_r": None, "target_r": None, "total_step": None,
             "beta1": None, "beta2": None, "deltaT": None, "orth_reg_weight": None},
     "AdaLoRA's singular values, but the config is LoRA's"),
    ("ada", {"lora_alpha": 0}, "field 'lora_alpha' is refused"),
    ("ada", {"lora_alpha": -6}, "field 'lora_alpha' is refused"),
    ("ada", {"init_r": 0}, "field 'init_r' is refused"),
    ("ada", {"init_r": 5}, r"rank_pattern of .* does not fit init_r; got 4 entries; need 5"),
    ("ada", {"rank_pattern": None}, r"wrong shape; got \[2, 32\]; need \[4, in\]"),
    ("ada", {"rank_pattern": {"x": 3}}, "field 'rank_pattern.x' is refused"),
    ("saved", {"modules_to_save": None}, "unexpected tensors|replaces a tensor of the base"),
    ("saved", {"trainable_token_indices": None}, "trainable_token_indices does not name it"),
    ("saved", {"trainable_token_indices": [3, 3]}, "one row for each of the different token ids"),
    ("saved", {"trainable_token_indices": [3, 64]}, "for token ids up to 64; need"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), CONFIGS, ids=[case[2][:50] for case in CONFIGS])
def test_wrong_configs_are_refused(
    copied: Callable[[str], Path], root: Path, name: str, change: dict[str, Any], message: str
) -> None:
    folder = copied(name)
    edit_json(folder / CONFIG, **change)
    with pytest.raises(UserError, match=message):
        check_against_base(read(folder), describe_base(str(root / "base")))


def test_an_adapter_without_any_rank_is_refused(tmp_path: Path, root: Path) -> None:
    kept = {"model.layers.0.self_attn.q_proj": [False] * 4}
    folder = write_adalora(tmp_path / "nothing", root / "base", ("q_proj",), kept=kept)
    with pytest.raises(UserError, match="AdaLoRA kept no rank of any module"):
        read(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora", r"a gate cannot mix dora experts: DoRA divides the changed weight by its norm"),
        ("ada", r"a gate cannot mix adalora experts: PEFT's X-LoRA takes LoRA experts only"),
        ("saved", "a gate cannot mix an expert that replaces weights of the base"),
    ],
)
def test_a_gate_takes_plain_loras_only(tmp_path: Path, root: Path, name: str, message: str) -> None:
    experts = {"one": root / name, "two": root / "lora"}
    gate = write_gate(tmp_path / "gate", root / "base", experts)
    with pytest.raises(UserError, match=message):
        read_adapters([AdapterSource(gate)], None, topk_softmax=None, cache=CacheChoice.KV)


def test_a_weight_is_replaced_or_adapted_not_both(tmp_path: Path) -> None:
    from peft import LoraConfig

    base = write_base(tmp_path / "base", num_hidden_layers=1, tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], trainable_token_indices=[1], task_type="CAUSAL_LM")
    folder = write_adapter(tmp_path / "both", write_base(tmp_path / "untied", num_hidden_layers=1), config)
    adapters = read(folder)
    check_against_base(adapters, describe_base(str(tmp_path / "untied")))
    with pytest.raises(
        UserError, match=r"model\.embed_tokens\.weight is replaced and has a LoRA at once; got a LoRA on lm_head"
    ):
        check_against_base(adapters, describe_base(str(base)))
    ends = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]}, task_type="CAUSAL_LM")
    folder = write_adapter(tmp_path / "head", tmp_path / "untied", ends)
    check_against_base(read(folder), describe_base(str(base)))  # the head comes apart: test_tying


def test_no_token_ids_replace_nothing(copied: Callable[[str], Path], root: Path) -> None:
    """PEFT writes such folders: their rows are [0, width]."""
    folder = copied("saved")
    edit_json(folder / CONFIG, trainable_token_indices=[])
    edit_tensors(folder / WEIGHTS, put(ROWS, lambda t: t[:0]))
    adapters = read(folder)
    check_against_base(adapters, describe_base(str(root / "base")))
    replaced = adapters.experts[0].replacements
    assert "lm_head.weight" in replaced
    assert "model.embed_tokens.weight" not in replaced
