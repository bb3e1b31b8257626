"""LoRA folders written by PEFT are read exactly, and what we cannot represent is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from exporter.adapters import AdapterSet
from exporter.checkpoints import check_against_base, describe_base, read_adapters
from exporter.spec import AdapterSource, CacheChoice
from runtime.adapter_folder.patterns import TargetRule, check_pattern, value_for
from runtime.errors import InputError, Problems, UserError
from tests.exporter.checkpoint_makers import edit_json, edit_tensors, load_model, write_base, write_lora

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("lora") / "base")


def read(*folders: Path, **names: Path) -> AdapterSet:
    sources = [AdapterSource(folder) for folder in folders]
    sources += [AdapterSource(folder, name) for name, folder in names.items()]
    return read_adapters(sources, None, topk_softmax=None, cache=CacheChoice.KV)


def assert_equals_peft(base: Path, folder: Path) -> None:
    """scale * B A of every module, against PEFT's own delta weight of the folder loaded by PEFT."""
    expert = read(folder).experts[0]
    model = PeftModel.from_pretrained(load_model(base), folder)
    layers = {path: module for path, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert set(layers) == set(expert.deltas)
    for path, layer in layers.items():
        delta = expert.deltas[path]
        ours = delta.scale * (delta.b @ delta.a)
        theirs = layer.get_delta_weight("default")
        if layer.fan_in_fan_out or layer.lora_embedding_A:
            ours = ours.T  # embeddings and Conv1D hold their weight as [in, out]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        assert theirs.abs().max() > 1e-2


@pytest.mark.parametrize(
    "config",
    [
        {"targets": ATTENTION},
        {"targets": (*ATTENTION, *MLP), "rank": 3},
        {"targets": ATTENTION, "use_rslora": True},
        {"targets": ATTENTION, "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}},
        {"targets": ATTENTION, "alpha_pattern": {"k_proj": 32}, "rank_pattern": {r".*\.o_proj": 1}, "use_rslora": True},
        {"targets": r".*\.layers\.1\..*(q|down)_proj"},
        {"targets": ("q_proj",), "layers_to_transform": [1]},
        {"targets": (*ATTENTION,), "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"targets": "all-linear"},
        {"targets": ("embed_tokens", "v_proj")},
        {"targets": ("lm_head", "q_proj")},
    ],
    ids=lambda config: "-".join(map(str, config)),
)
def test_every_kind_of_lora_equals_peft(tmp_path: Path, base: Path, config: dict[str, Any]) -> None:
    folder = write_lora(tmp_path / "lora", base, **config)
    assert_equals_peft(base, folder)
    check_against_base(read(folder), describe_base(str(base)))


def test_conv1d_of_gpt2_equals_peft(tmp_path: Path) -> None:
    base = write_base(tmp_path / "gpt2", "gpt2")
    folder = write_lora(tmp_path / "lora", base, ("c_attn", "c_proj"), fan_in_fan_out=True)
    assert_equals_peft(base, folder)
    check_against_base(read(folder), describe_base(str(base)))


def test_tensors_are_those_of_the_file(tmp_path: Path, base: Path) -> None:
    folder = write_lora(tmp_path / "lora", base)
    stored = load_file(folder / "adapter_model.safetensors")
    delta = read(folder).experts[0].deltas["model.layers.1.self_attn.v_proj"]
    prefix = "base_model.model.model.layers.1.self_attn.v_proj"
    assert torch.equal(delta.a, stored[f"{prefix}.lora_A.weight"])
    assert torch.equal(delta.b, stored[f"{prefix}.lora_B.weight"])
    assert delta.scale == 8 / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_float_dtypes_are_lifted_to_float32(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    folder = write_lora(tmp_path / "lora", base)
    exact = read(folder).experts[0].deltas
    edit_tensors(folder / "adapter_model.safetensors", lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    for path, delta in read(folder).experts[0].deltas.items():
        assert delta.a.dtype is torch.float32
        assert torch.equal(delta.a, exact[path].a.to(dtype).float())


def test_experts_with_different_targets_are_read(tmp_path: Path, base: Path) -> None:
    """PEFT before 0.16 raised KeyError when one expert had no LoRA on a module of another."""
    narrow = write_lora(tmp_path / "narrow", base, ("q_proj", "v_proj"), 2)
    wide = write_lora(tmp_path / "wide", base, ("q_proj", "k_proj", "v_proj"), 5)
    adapters = read(narrow, wide)
    sites = [{path.rpartition(".")[2] for path in expert.deltas} for expert in adapters.experts]
    assert sites == [{"q_proj", "v_proj"}, {"q_proj", "k_proj", "v_proj"}]
    assert check_against_base(adapters, describe_base(str(base))) == []


def test_names_are_given_or_made_valid_and_unique(tmp_path: Path, base: Path) -> None:
    write_lora(tmp_path / "a" / "my skill!", base)
    write_lora(tmp_path / "b" / "My-skill", base)
    adapters = read(tmp_path / "a" / "my skill!", tmp_path / "b" / "My-skill", math=tmp_path / "b" / "My-skill")
    assert [expert.name for expert in adapters.experts] == ["my-skill", "My-skill-2", "math"]
    assert adapters.notes == ("expert 'my skill!' is called my-skill", "expert 'My-skill' is called My-skill-2")


def test_target_rule_agrees_with_peft() -> None:
    paths = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.up_proj")]
    paths += ["lm_head", "model.embed_tokens", "q_proj", "model.layers.1.experts.0.q_proj", "xq_proj"]
    rules = [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": r"model\.layers\.\d\.self_attn\.q_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.1.self_attn.q_proj", "lm_head"]},
    ]
    for rule in rules:
        config = LoraConfig(**rule)
        # LoraConfig turns lists into sets; ours comes from JSON.
        ours = TargetRule(
            targets=rule["target_modules"]
            if isinstance(rule["target_modules"], str)
            else tuple(rule["target_modules"]),
            excluded=rule.get("exclude_modules", ()),  # type: ignore[arg-type]
            blocks=tuple([b] if isinstance(b := rule.get("layers_to_transform", []), int) else b),
            block_patterns=tuple([p] if isinstance(p := rule.get("layers_pattern", []), str) else p),
        )
        for path in paths:
            theirs = check_target_module_exists(config, path)
            assert ours(path) is (bool(theirs) and "Excluded" not in type(theirs).__name__), (rule, path)


def test_pattern_values_agree_with_peft() -> None:
    patterns = {"q_proj": 1, r"layers\.1\.self_attn\..*": 2, "^model.lm": 3, "odd(": 4}
    for path in ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "aq_proj", "v_proj", "model.lm"):
        usable = {key: value for key, value in patterns.items() if key != "odd("}
        assert value_for(usable, path, 9) == usable.get(get_pattern_key(list(usable), path), 9)


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(.*)*", r"(a)\1", "(", "a)(b", ".*.*.*.*.*.*.*x", "x" * 2000, "((a{2,9}){2,9})"]
)
def test_endless_and_broken_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="a pattern of rank_pattern is refused"):
        check_pattern(pattern, "rank_pattern", "x")


def test_usual_patterns_pass() -> None:
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|v_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
    )
    for pattern in (unsloth, r".*\.(q|v)_proj", r"model\.layers\.([0-9]|1[0-9])\..*proj"):
        check_pattern(pattern, "target_modules", "x")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, r"q_proj has no complete set of dora tensors; got .*; need lora_A.weight and .*magnitude"),
    ({"lora_bias": True}, "lora_bias = True cannot be exported"),
    ({"bias": "all"}, "bias = 'all' cannot be exported"),
    ({"modules_to_save": "lm_head"}, "field 'modules_to_save' is refused"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters = .* mixture-of-experts"),
    ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    ({"layer_replication": [[0, 2]]}, "number of blocks"),
    ({"trainable_token_indices": [1]}, "their rows are not in the file; got no token_adapter of the embedding"),
    ({"trainable_token_indices": {"lm_head": [1]}}, "got no token_adapter of lm_head"),
    ({"trainable_token_indices": [-1]}, "field 'trainable_token_indices.* is refused"),
    ({"use_qalora": True}, "QALoRA"),
    ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    ({"arrow_config": {"top_k": 2}}, "Arrow"),
    ({"velora_config": {"x": 1}}, "VeLoRA"),
    ({"monteclora_config": {"x": 1}}, "MonteCLoRA"),
    ({"kasa_config": {"x": 1}}, "KaSA"),
    ({"megatron_config": {"x": 1}}, "Megatron"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' .* changes the base"),
    ({"init_lora_weights": "olora"}, "changes the base weights"),
    ({"init_lora_weights": "loftq"}, "changes the base weights"),
    ({"init_lora_weights": "corda"}, "changes the base weights"),
    ({"init_lora_weights": "lora_ga"}, "changes the base weights"),
    ({"brand_new_field": {"on": True}}, "'brand_new_field' = .* not known here"),
    ({"peft_type": "IA3"}, "got peft_type 'IA3'; need peft_type 'LORA'"),
    ({"peft_type": "ADALORA"}, r"unexpected tensors.*lora_A\.weight"),
    ({"peft_type": ...}, "got peft_type None"),
    ({"r": 0}, "field 'r' is refused: Input should be greater than or equal to 1"),
    ({"r": 1025}, "field 'r' is refused"),
    ({"r": True}, "field 'r' is refused"),
    ({"r": "8"}, "field 'r' is refused"),
    ({"lora_alpha": 0}, "field 'lora_alpha' is refused"),
    ({"lora_alpha": 65537}, "field 'lora_alpha' is refused"),
    ({"alpha_pattern": {"q_proj": -1}}, "field 'alpha_pattern.q_proj' is refused"),
    ({"rank_pattern": {"q_proj": 4000}}, "field 'rank_pattern.q_proj' is refused"),
    ({"target_modules": ["k_proj"]}, "has LoRA tensors but is not among the targets"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return write_lora(tmp_path_factory.mktemp("plain") / "plain", base)


@pytest.fixture
def copied(tmp_path: Path, plain: Path) -> Path:
    """A fresh copy of a good LoRA, for one test to spoil."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((plain / name).read_bytes())
    return folder


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_fields_are_refused_by_name(copied: Path, change: dict[str, Any], message: str) -> None:
    read(copied)
    edit_json(copied / "adapter_config.json", **change)
    with pytest.raises(UserError, match=message) as caught:
        read(copied)
    assert str(copied) in str(caught.value)


def test_unset_unknown_fields_are_fine(copied: Path) -> None:
    edit_json(copied / "adapter_config.json", next_years_field=None, another=False)
    assert read(copied).experts


def test_all_problems_are_reported_at_once(copied: Path) -> None:
    edit_json(copied / "adapter_config.json", lora_bias=True, lora_alpha=-1, bias="all", r=9999)
    with pytest.raises(Problems, match="4 problems") as caught:
        read(copied)
    for part in ("lora_bias", "'lora_alpha'", "'r'", "bias = 'all'"):
        assert part in str(caught.value)


def test_problems_of_several_folders_come_together(copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    edit_json(copied / "adapter_config.json", lora_bias=True)
    with pytest.raises(Problems) as caught:
        read(copied, other)
    assert "lora_bias" in str(caught.value)
    assert "IA3" in str(caught.value)


def test_expert_subfolders_of_an_xlora_save_are_refused(copied: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("base_model.model.", "base_model.lora_model.model.", 1)] = tensors.pop(key)

    edit_tensors(copied / "adapter_model.safetensors", rename)
    with pytest.raises(UserError, match="expert sub-folder of an X-LoRA save"):
        read(copied)


def test_a_whole_model_is_no_adapter(base: Path) -> None:
    with pytest.raises(InputError, match="is a whole model, perhaps with its adapter already merged"):
        read(base)


def test_conv2d_is_refused(copied: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(copied / "adapter_model.safetensors", lambda t: t.update({key: t[key][:, :, None, None].contiguous()}))
    with pytest.raises(UserError, match=re.escape(f"tensor {key} belongs to a Conv2d")):
        read(copied)


def test_a_key_without_gate_is_refused(copied: Path) -> None:
    with pytest.raises(InputError, match="KEY:NAME=DIR needs a gate"):
        read_adapters([AdapterSource(copied, "a", "0")], None, topk_softmax=None, cache=CacheChoice.KV)


def test_resized_or_retrained_embeddings_are_refused(tmp_path: Path, base: Path) -> None:
    folder = write_lora(tmp_path / "lora", base, ("embed_tokens",))
    notes = check_against_base(read(folder), describe_base(str(base)))
    assert notes == ["expert:lora: model.embed_tokens.weight is saved beside the LoRA and equals the base's"]
    other = write_base(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"embed_tokens.base_layer.weight replaces a tensor of the base"):
        check_against_base(read(folder), describe_base(str(other)))


def test_an_unnamed_folder_does_not_take_a_name_that_was_given(tmp_path: Path, base: Path) -> None:
    for folder in ("one", "two/math", "3"):
        write_lora(tmp_path / folder, base)
    adapters = read(tmp_path / "two" / "math", tmp_path / "3", math=tmp_path / "one")
    assert [(expert.name, expert.folder.name) for expert in adapters.experts] == [
        ("math-2", "math"),
        ("3", "3"),
        ("math", "one"),
    ]
    assert adapters.notes == ("expert 'math' is called math-2",)
