"""X-LoRA folders of both layouts: gate tensors, column order, relocation, repair, top-k rules."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exporter.adapters import AdapterSet, GateConfig
from exporter.checkpoints import base_reference, check_against_base, describe_base, read_adapters
from exporter.spec import AdapterSource, CacheChoice
from runtime.errors import InputError, UserError
from runtime.manifest import TopkSoftmax
from tests.exporter.checkpoint_makers import (
    classifier_tensors,
    edit_json,
    edit_tensors,
    make_xlora,
    write_base,
    write_experts,
    write_live_xlora,
    write_lora,
    write_xlora_original,
    write_xlora_peft,
    write_xlora_peft_damaged,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("xlora") / "base")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[Path]:
    return write_experts(tmp_path_factory.mktemp("xlora") / "experts", base, 3)


def read(
    folder: Path, *sources: AdapterSource, gate: Path | None = None, topk: TopkSoftmax | None = None,
    cache: CacheChoice = CacheChoice.KV,
) -> AdapterSet:  # fmt: skip
    first = [AdapterSource(folder)] if gate is None else []
    return read_adapters([*first, *sources], gate, topk_softmax=topk, cache=cache)


def gate_of(adapters: AdapterSet) -> GateConfig:
    assert adapters.gate is not None
    return adapters.gate


def names(adapters: AdapterSet) -> list[str]:
    return [expert.name for expert in adapters.experts]


def apply_gate(gate: GateConfig, hidden: torch.Tensor) -> torch.Tensor:
    """The classifier's logits, straight from the GateConfig docstring."""
    for index, (weight, bias) in enumerate(zip(gate.weights, gate.biases, strict=True)):
        hidden = torch.nn.functional.linear(hidden, weight, bias)
        if gate.relu and index < len(gate.weights) - 1:
            hidden = hidden.relu()
    return hidden


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layerwise", [False, True])
def test_peft_gate_is_read_exactly(
    tmp_path: Path, base: Path, experts: list[Path], depth: int, dropout: float, layerwise: bool
) -> None:
    model = make_xlora(base, experts, xlora_depth=depth, xlora_dropout_p=dropout, layerwise_scalings=layerwise)
    write_live_xlora(tmp_path / "x", model)
    adapters = read(tmp_path / "x")
    hidden = torch.randn(5, 32)
    theirs = model.base_model.internal_xlora_classifier.layers(hidden)
    torch.testing.assert_close(apply_gate(gate_of(adapters), hidden), theirs, rtol=0, atol=0)
    assert theirs.shape[-1] == (3 * 4 if layerwise else 3)
    assert check_against_base(adapters, describe_base(base_reference(None, adapters))) == []


def test_all_settings_arrive(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    config = {
        "softmax_temperature": 0.5, "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True,
        "scaling_pass_value": 0.25, "global_scaling_weight": 1.5, "layerwise_scalings": True,
    }  # fmt: skip
    gate = gate_of(read(write_xlora_peft(tmp_path / "x", base, experts, **config)))
    assert (gate.temperature, gate.top_k, gate.softmax, gate.softmax_topk) == (0.5, 2, False, True)
    assert (gate.scaling_pass_value, gate.global_scaling_weight, gate.layerwise) == (0.25, 1.5, True)
    assert gate.topk_softmax is TopkSoftmax.TOKEN


def test_scaling_pass_value_none_is_one_over_n(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    folder = write_xlora_peft(tmp_path / "x", base, experts)
    edit_json(folder / "adapter_config.json", scaling_pass_value=None)
    assert gate_of(read(folder)).scaling_pass_value == 1 / 3


def test_eleven_experts_come_in_numeric_order(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    many = [experts[index % 3] for index in range(12)]
    moved = []
    for index, path in enumerate(many):
        moved.append(shutil.copytree(path, tmp_path / f"expert{index}"))
    folder = write_xlora_peft(tmp_path / "x", base, moved)
    stored = json.loads((folder / "adapter_config.json").read_text())["adapters"]
    assert list(stored)[:4] == ["0", "1", "10", "11"]
    adapters = read(folder)
    assert names(adapters) == [f"expert{index}" for index in range(12)]
    assert adapters.notes[0].startswith("gate columns follow the numbers of the keys (0, 1, 2, 3,")
    assert f"column 10: key 10 = expert10 from {tmp_path / 'expert10'}" in adapters.notes


@pytest.mark.parametrize(("count", "depth"), [(3, 1), (4, 3), (7, 3), (3, 2)])
def test_damaged_saves_are_repaired_bit_exactly(
    tmp_path: Path, base: Path, experts: list[Path], count: int, depth: int
) -> None:
    many = [experts[index % 3] for index in range(count)]
    complete = write_xlora_peft_damaged(tmp_path / "x", base, many, xlora_depth=depth, layerwise_scalings=True)
    kept = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert len(kept) < len(complete), "this PEFT no longer loses gate layers"
    adapters = read(tmp_path / "x")
    lost = [key for key in complete if key not in kept and key.endswith("weight")]
    assert sum("repaired bit-exactly from" in note for note in adapters.notes) == 1
    assert all(f"layers.{key.split('.')[-2]}" in " ".join(adapters.notes) for key in lost)
    gate = gate_of(adapters)
    assert len(gate.weights) == depth
    for key, value in complete.items():
        index = int(key.split(".")[-2]) // 3
        ours = gate.weights[index] if key.endswith("weight") else gate.biases[index]
        assert ours is not None
        assert torch.equal(ours, value)


def test_a_damaged_save_without_subfolders_is_refused(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    write_xlora_peft_damaged(tmp_path / "x", base, experts)
    shutil.rmtree(tmp_path / "x" / "0")
    with pytest.raises(
        InputError, match=r"missing and cannot be recovered; got .*layers\.0\.weight.*numbered sub-fold"
    ):
        read(tmp_path / "x")


def test_a_repair_of_the_wrong_shape_is_refused(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    write_xlora_peft_damaged(tmp_path / "x", base, experts)
    key = "base_model.internal_xlora_classifier.layers.weight"
    edit_tensors(tmp_path / "x" / "0" / "adapter_model.safetensors", lambda t: t.update({key: torch.zeros(3, 31)}))
    with pytest.raises(UserError, match=r"layers\.weight does not fit the config; got F32 \[3, 31\]"):
        read(tmp_path / "x")


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(("relu", "bias"), [(True, True), (False, True), (True, False)])
def test_original_layout(
    tmp_path: Path, base: Path, experts: list[Path], as_list: bool, depth: int, relu: bool, bias: bool
) -> None:
    folder = write_xlora_original(
        tmp_path / "x", base, experts, as_list=as_list, n_sites=4, xlora_depth=depth, enable_relu_and_dropout=relu,
        use_bias=bias,
    )  # fmt: skip
    adapters = read(folder)
    assert names(adapters) == ["adapter_1", "adapter_2", "adapter_3"]
    gate = gate_of(adapters)
    assert gate.relu is relu
    tensors = load_file(folder / "xlora_classifier.safetensors")
    order = sorted(
        (key for key in tensors if "inner" in key and "weight" in key), key=lambda key: int(key.split(".")[1])
    )
    for ours, key in zip(gate.weights, [*order, "last.weight"], strict=True):
        assert torch.equal(ours, tensors[key])
        assert all((b is not None) is bias for b in gate.biases)
    assert check_against_base(adapters, describe_base(str(base))) == []
    assert base_reference(None, adapters) == str(base) or as_list


def test_original_layout_equals_peft_layout(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    """The same gate stored both ways is one GateConfig."""
    model = make_xlora(base, experts, xlora_depth=2)
    write_live_xlora(tmp_path / "peft", model)
    write_xlora_original(tmp_path / "orig", base, experts, xlora_depth=2)
    tensors = classifier_tensors(model)
    new = {"inner.0": "0", "last": "3"}
    edit_tensors(
        tmp_path / "orig" / "xlora_classifier.safetensors",
        lambda t: t.update({key: tensors[f"base_model.internal_xlora_classifier.layers.{new[key.rpartition('.')[0]]}."
                                         f"{key.rpartition('.')[2]}"] for key in t}),
    )  # fmt: skip
    one, two = gate_of(read(tmp_path / "peft")), gate_of(read(tmp_path / "orig"))
    hidden = torch.randn(3, 32)
    assert torch.equal(apply_gate(one, hidden), apply_gate(two, hidden))


def test_keys_with_a_number_follow_it(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    folder = write_xlora_original(tmp_path / "x", base, [experts[i % 3] for i in range(11)])
    content = json.loads((folder / "xlora_config.json").read_text())
    edit_json(folder / "xlora_config.json", adapters=dict(sorted(content["adapters"].items())))
    assert names(read(folder)) == [f"adapter_{index}" for index in range(1, 12)]


def test_free_names_keep_their_stored_order(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    named = {"writing": experts[0], "coding": experts[1], "art2": experts[2]}
    assert names(read(write_xlora_original(tmp_path / "x", base, named))) == ["writing", "coding", "art2"]


def test_stale_hub_paths_of_the_original_layout_fall_back_to_its_subfolders(
    tmp_path: Path, base: Path, experts: list[Path]
) -> None:
    folder = write_xlora_original(tmp_path / "x", base, experts)
    stale = {f"adapter_{i}": f"lamm-mit/x-lora-gemma-7b/adapter_{i}" for i in (1, 2, 3)}
    edit_json(folder / "xlora_config.json", adapters=stale, stop_token_id=3)
    assert [expert.folder.name for expert in read(folder).experts] == ["adapter_1", "adapter_2", "adapter_3"]


# --- relocation and names ---


@pytest.fixture
def moved(tmp_path: Path, base: Path, experts: list[Path]) -> Path:
    """An X-LoRA folder whose stored expert paths no longer exist; the experts are in `tmp_path/new*`."""
    folder = write_xlora_peft(tmp_path / "x", base, experts)
    stored = {str(i): f"/gone/skill{i}" for i in range(3)}
    edit_json(folder / "adapter_config.json", adapters=stored)
    for index, path in enumerate(experts):
        shutil.copytree(path, tmp_path / f"new{index}")
    return folder


def test_missing_experts_are_named_with_the_remedy(moved: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(moved)
    for index in range(3):
        assert f"skill{index}=DIR" in str(caught.value)


@pytest.mark.parametrize("with_gate_flag", [False, True])
def test_experts_are_relocated_by_key_and_name(moved: Path, tmp_path: Path, with_gate_flag: bool) -> None:
    sources = [
        AdapterSource(tmp_path / "new2", "code", "2"),  # KEY:NAME=DIR
        AdapterSource(tmp_path / "new0", "0"),  # NAME is a key
        AdapterSource(tmp_path / "new1", "skill1"),  # NAME is a stored folder's basename
    ]
    adapters = read(moved, *sources, gate=moved if with_gate_flag else None)
    assert names(adapters) == ["skill0", "skill1", "code"]
    assert [expert.folder.name for expert in adapters.experts] == ["new0", "new1", "new2"]
    assert [expert.key for expert in adapters.experts] == ["0", "1", "2"]
    ranks = [next(iter(expert.deltas.values())).a.shape[0] for expert in adapters.experts]
    assert ranks == [2, 3, 4]


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("math", None, "'math' is no key, stored name or stored folder of the gate"),
        ("math", "7", "the gate has no key '7'"),
        ("0", "1", None),
    ],
)
def test_unclear_relocation_shows_the_mapping(
    moved: Path, tmp_path: Path, name: str, key: str | None, message: str | None
) -> None:
    sources = [AdapterSource(tmp_path / "new0", name, key)]
    if message is None:
        sources += [AdapterSource(tmp_path / f"new{i}", f"skill{i}") for i in (0, 2)]
        assert names(read(moved, *sources)) == ["skill0", "0", "skill2"]
        return
    with pytest.raises(InputError, match=message) as caught:
        read(moved, *sources)
    assert "column 1: key '1' = '/gone/skill1'" in str(caught.value)
    assert "write KEY:NAME=DIR" in str(caught.value)


def test_one_key_cannot_be_given_twice(moved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two folders are given for key '0'"):
        read(moved, AdapterSource(tmp_path / "new0", "a", "0"), AdapterSource(tmp_path / "new1", "b", "0"))


def test_stored_paths_are_tried_from_the_checkpoint_first(
    tmp_path: Path, base: Path, experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_xlora_peft(tmp_path / "ckpt" / "x", base, experts)
    edit_json(folder / "adapter_config.json", adapters={str(i): f"../skill{i}" for i in range(3)})
    (tmp_path / "cwd").mkdir()
    for index in range(3):
        shutil.copytree(experts[index], tmp_path / f"skill{index}")
    monkeypatch.chdir(tmp_path / "cwd")
    assert [e.folder.resolve() for e in read(folder).experts] == [tmp_path / f"skill{i}" for i in range(3)]
    for index in range(3):
        shutil.copytree(experts[index], tmp_path / "ckpt" / f"skill{index}")
    assert [e.folder.resolve() for e in read(folder).experts] == [tmp_path / "ckpt" / f"skill{i}" for i in range(3)]


def test_one_folder_for_two_columns_gets_two_names(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    folder = write_xlora_peft(tmp_path / "x", base, [experts[0], experts[1], experts[0]])
    assert names(read(folder)) == ["skill0", "skill1", "skill0-2"]


def test_no_expert_is_called_like_the_mix_without_experts(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    odd = shutil.copytree(experts[0], tmp_path / "Base")
    adapters = read(write_xlora_peft(tmp_path / "x", base, [odd, *experts[1:]]))
    assert names(adapters) == ["Base-2", "skill1", "skill2"]
    with pytest.raises(UserError, match="an expert cannot be called so; got 'base'"):
        read(tmp_path / "x", AdapterSource(experts[1], "base", "1"))


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k_lora": 4}, "'top_k_lora' is larger than the number of experts; got 4; need 1 to 3"),
        ({"top_k_lora": 0}, "'top_k_lora' is refused"),
        ({"softmax_temperature": 0.0}, "'softmax_temperature' is refused"),
        ({"softmax_temperature": 1e-4}, "'softmax_temperature' is refused"),
        ({"hidden_size": None}, "'hidden_size' is refused"),
        ({"hidden_size": 31}, r"layers\.0\.weight does not fit the config; got F32 \[3, 32\]"),
        ({"adapters": {}}, "'adapters.*' is refused"),
        ({"adapters": {"1": "a", "01": "b"}}, "two keys of 'adapters' are the same number"),
        ({"xlora_depth": 0}, "'xlora_depth' is refused"),
        ({"xlora_depth": 2}, r"missing and cannot be recovered; got .*layers\.3\.weight"),
        ({"layerwise_scalings": True}, r"does not fit the config; got F32 \[3, 32\]; need a float tensor \[12, 32\]"),
        ({"use_bias": False, "enable_mystery": 1}, "'enable_mystery' = 1 cannot be exported: this field is not known"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_gate_configs_are_refused(
    tmp_path: Path, base: Path, experts: list[Path], change: dict[str, Any], message: str
) -> None:
    folder = write_xlora_peft(tmp_path / "x", base, experts)
    edit_json(folder / "adapter_config.json", **change)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_pooled_classifiers_are_refused(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    folder = write_xlora_original(tmp_path / "x", base, experts, use_mean_pool=True)
    with pytest.raises(InputError, match="pooled classifier"):
        read(folder)


def test_extra_gate_tensors_are_refused(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    folder = write_xlora_peft(tmp_path / "x", base, experts)
    edit_tensors(folder / "adapter_model.safetensors", lambda t: t.update(evil=torch.zeros(1)))
    with pytest.raises(InputError, match="unexpected tensors; got 'evil'"):
        read(folder)


def test_two_gates_and_lora_as_gate_are_refused(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    folder = write_xlora_peft(tmp_path / "x", base, experts)
    with pytest.raises(InputError, match="several X-LoRA folders"):
        read(folder, AdapterSource(folder))
    with pytest.raises(InputError, match="is a LoRA, not an X-LoRA gate"):
        read(folder, gate=experts[0])


def test_an_xlora_is_no_expert(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    folder = write_xlora_peft(tmp_path / "x", base, experts)
    edit_json(folder / "adapter_config.json", adapters={"0": str(experts[0]), "1": str(experts[1]), "2": str(folder)})
    with pytest.raises(UserError, match="got peft_type 'XLORA'; need peft_type 'LORA'"):
        read(folder)


TOPK = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}


@pytest.mark.parametrize(
    ("version", "rule"),
    [("0.18.0", TopkSoftmax.TOKEN), ("0.21.2", TopkSoftmax.TOKEN), ("1.0", TopkSoftmax.TOKEN),
     ("0.17.1", TopkSoftmax.FLATTENED), ("0.9.0", TopkSoftmax.FLATTENED), ("0.18.0.dev0@abc", None), (..., None),
     ("unknown", None)],
)  # fmt: skip
def test_topk_rule_follows_the_peft_version(
    tmp_path: Path, base: Path, experts: list[Path], version: Any, rule: TopkSoftmax | None
) -> None:
    folder = write_xlora_peft(tmp_path / "x", base, experts, **TOPK)
    edit_json(folder / "adapter_config.json", peft_version=version)
    if rule is None:
        with pytest.raises(InputError, match=r"not by which rule it was trained.*--topk-softmax token"):
            read(folder, cache=CacheChoice.NONE)
    else:
        assert gate_of(read(folder, cache=CacheChoice.NONE)).topk_softmax is rule
    assert gate_of(read(folder, topk=TopkSoftmax.TOKEN)).topk_softmax is TopkSoftmax.TOKEN


def test_a_rule_for_what_the_gate_does_not_do_is_refused(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    with pytest.raises(UserError, match=r"takes no softmax over its top k\. Fix: leave --topk-softmax out"):
        read(write_xlora_peft(tmp_path / "x", base, experts), topk=TopkSoftmax.TOKEN)


def test_original_layout_must_say_its_topk_rule(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    folder = write_xlora_original(tmp_path / "x", base, experts, **TOPK)
    with pytest.raises(InputError, match="not by which rule"):
        read(folder)
    with pytest.raises(InputError, match=r"flattened top-k softmax cannot run with a KV cache.*--cache none"):
        read(folder, topk=TopkSoftmax.FLATTENED)
    gate = gate_of(read(folder, topk=TopkSoftmax.FLATTENED, cache=CacheChoice.NONE))
    assert gate.topk_softmax is TopkSoftmax.FLATTENED


def test_base_reference(tmp_path: Path, base: Path, experts: list[Path]) -> None:
    folder = write_xlora_peft(tmp_path / "x", base, experts)
    adapters = read(folder)
    assert base_reference(None, adapters) == str(base)
    assert base_reference("other", adapters) == "other"
    edit_json(folder / "adapter_config.json", base_model_name_or_path="no/such-base")
    with pytest.raises(InputError, match=r"do not name one base that can be found here.*'no/such-base'"):
        base_reference(None, read(folder))
    relative = os.path.relpath(base, folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=relative)
    assert base_reference(None, read(folder)) == str(base.resolve())


def test_unnamed_base_is_asked_for(tmp_path: Path, base: Path) -> None:
    lora = write_lora(tmp_path / "lora", base)
    edit_json(lora / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(InputError, match=r"name no base.*give --base DIR"):
        base_reference(None, read(lora))
