"""The base model: described from config and headers, loaded complete and finite, refused when it is anything else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.adapters import AdapterSet
from exporter.checkpoints import (
    ModuleKind,
    base_reference,
    check_against_base,
    compare_sources,
    describe_base,
    load_base,
    read_adapters,
    source_files,
)
from exporter.spec import AdapterSource, CacheChoice
from runtime.errors import InputError, UserError
from tests.exporter.checkpoint_makers import edit_json, edit_tensors, load_model, write_base, write_lora
from tests.exporter.tiny_builds import DECODERS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def copied(tmp_path: Path, base: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copied"))


def read(folder: Path) -> AdapterSet:
    return read_adapters([AdapterSource(folder)], None, topk_softmax=None, cache=CacheChoice.KV)


@pytest.mark.parametrize("family", DECODERS)
def test_description_is_that_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    folder = write_base(tmp_path / family, family)
    description = describe_base(str(folder))
    model = load_base(description, torch.float32)
    assert description.model_type == family
    assert description.tied_embeddings is (model.lm_head.weight is model.get_input_embeddings().weight)
    real = {path: type(module).__name__ for path, module in model.named_modules() if not list(module.children())}
    assert {path: info.type_name for path, info in description.modules.items()} == real
    assert list(description.modules) == list(real)
    for path, info in description.modules.items():
        if info.kind in (ModuleKind.LINEAR, ModuleKind.EMBEDDING, ModuleKind.CONV1D):
            weight = model.get_submodule(path).weight
            sizes = (info.in_features, info.out_features)
            assert tuple(weight.shape) == (sizes[::-1] if info.kind is ModuleKind.LINEAR else sizes)


def test_a_description_reads_no_weights(tmp_path: Path) -> None:
    """A config of 70 billion parameters is described although no such weights exist."""
    folder = write_base(tmp_path / "small")
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    edit_json(folder / "config.json", **big, num_key_value_heads=8, vocab_size=128256, head_dim=128)
    save_file({"unrelated": torch.zeros(1)}, folder / "model.safetensors")
    description = describe_base(str(folder))
    assert description.modules["model.layers.79.mlp.up_proj"].out_features == 28672


def test_loaded_weights_are_those_of_the_file(base: Path) -> None:
    model = load_base(describe_base(str(base)), torch.float32)
    stored = load_file(base / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, stored[key])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_load_rounds_to_the_dtype_asked_for(base: Path, dtype: torch.dtype) -> None:
    model = load_base(describe_base(str(base)), dtype)
    stored = load_file(base / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, stored.to(dtype))


def test_shards_are_found_through_the_index(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "sharded"
    load_model(base).save_pretrained(folder, max_shard_size="40KB")
    description = describe_base(str(folder))
    assert len(description.files) > 1
    model = load_base(description, torch.float32)
    assert torch.equal(model.lm_head.weight, load_file(base / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "x/y.safetensors", "model.bin", "a\0.safetensors"]
)
def test_an_index_cannot_name_files_elsewhere(copied: Path, name: str) -> None:
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="names a file outside its folder"):
        describe_base(str(copied))


CONFIG_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "gptq"}}, "the base is quantised; got .*gptq"),
    ({"model_type": "made_up"}, "model_type 'made_up' is not known"),
    ({"model_type": "made_up", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "needs code from its own repository"),
    ({"model_type": ["llama"]}, "model_type .* is not known"),
    ({"model_type": "bert_japanese"}, "is not known"),
    ({"model_type": "albert"}, "need a causal language model that transformers itself has, or an encoder: bert, dis"),
    ({"hidden_size": -1}, "field hidden_size is refused; got -1"),
    ({"num_hidden_layers": 10**9}, "field num_hidden_layers is refused"),
    ({"vocab_size": 10**30}, "field vocab_size is refused; got an integer of 100 bits"),
    ({"hidden_act": 7}, "transformers cannot make a model of this config"),
    ({"num_attention_heads": 3, "hidden_size": 31, "head_dim": ...}, "config"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_REFUSED, ids=lambda value: str(value)[:40])
def test_bad_base_configs_are_refused(copied: Path, change: dict[str, Any], message: str) -> None:
    describe_base(str(copied))
    edit_json(copied / "config.json", **change)
    with pytest.raises(UserError, match=message):
        describe_base(str(copied))


def test_weights_that_do_not_fit_the_config_are_refused(copied: Path) -> None:
    edit_json(copied / "config.json", vocab_size=65)
    with pytest.raises(
        UserError, match=r"tensor 'lm_head.weight' does not fit config.json; got \[64, 32\]; need \[65, 32\]"
    ):
        describe_base(str(copied))


def test_integer_weights_are_refused_as_quantised(copied: Path) -> None:
    edit_tensors(
        copied / "model.safetensors", lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)})
    )
    with pytest.raises(InputError, match="is I8: quantised bases are not supported"):
        describe_base(str(copied))


def test_missing_and_unused_weights_are_refused(copied: Path) -> None:
    """transformers only warns, and leaves the missing ones random."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["stray.weight"] = tensors.pop("model.norm.weight")

    edit_tensors(copied / "model.safetensors", rename)
    with pytest.raises(UserError) as caught:
        load_base(describe_base(str(copied)), torch.float32)
    assert "weights are missing from the base's files; got model.norm.weight" in str(caught.value).replace(
        str(copied), ""
    )
    assert "belong to no module; got stray.weight" in str(caught.value)


def test_non_finite_weights_are_refused(copied: Path) -> None:
    edit_tensors(copied / "model.safetensors", lambda t: t["lm_head.weight"][3].fill_(float("nan")))
    with pytest.raises(InputError, match=r"not finite as torch.float32; got lm_head.weight"):
        load_base(describe_base(str(copied)), torch.float32)


def test_weights_too_large_for_half_are_refused_with_a_hint(copied: Path) -> None:
    edit_tensors(copied / "model.safetensors", lambda t: t["lm_head.weight"][3].fill_(1e5))
    load_base(describe_base(str(copied)), torch.bfloat16)
    with pytest.raises(InputError, match=r"not finite as torch.float16.*bfloat16"):
        load_base(describe_base(str(copied)), torch.float16)


def test_no_folder_and_no_weights(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(InputError, match="is no folder and no hub id"):
        describe_base("../no where/")
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        describe_base(str(copied))
    (copied / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: cannot be opened"):
        describe_base(str(copied))


# --- the hub cache ---


@pytest.fixture
def cached(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub cache as huggingface_hub lays it out: snapshot files are links into blobs."""
    repo = tmp_path / "hub" / "models--acme--tiny"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for index, path in enumerate(sorted(base.iterdir())):
        shutil.copy(path, repo / "blobs" / f"blob{index}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{index}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return "acme/tiny"


def test_hub_ids_come_from_the_cache(tmp_path: Path, base: Path, cached: str) -> None:
    description = describe_base(cached)
    assert (description.name, description.reference) == ("acme/tiny", "acme/tiny")
    assert torch.equal(
        load_base(description, torch.float32).lm_head.weight, load_file(base / "model.safetensors")["lm_head.weight"]
    )
    lora = write_lora(tmp_path / "lora", base)
    edit_json(lora / "adapter_config.json", base_model_name_or_path=cached)
    adapters = read(lora)
    assert base_reference(None, adapters) == cached
    assert check_against_base(adapters, description) == []
    assert {"config.json", "model.safetensors"} <= {source.file for source in source_files(adapters, description)}


def test_a_hub_id_that_is_not_here_says_what_to_do(cached: str) -> None:
    with pytest.raises(UserError, match=r"not in the hub cache and could not be fetched.*give its folder") as caught:
        describe_base("acme/other")
    assert caught.value.exit_code == 3


# --- sources ---


def test_sources_are_listed_in_order_with_true_digests(tmp_path: Path, base: Path) -> None:
    lora = write_lora(tmp_path / "lora", base)
    sources = source_files(read(lora), describe_base(str(base)))
    assert [(source.role, source.file) for source in sources] == [
        ("base", "config.json"), ("base", "generation_config.json"), ("base", "model.safetensors"),
        ("expert:lora", "adapter_config.json"), ("expert:lora", "adapter_model.safetensors"),
    ]  # fmt: skip
    out = subprocess.run(["sha256sum", base / "model.safetensors"], capture_output=True, text=True, check=True)
    assert sources[2].sha256 == out.stdout.split()[0]
    assert sources[2].size == (base / "model.safetensors").stat().st_size


def test_changed_missing_and_added_sources_are_refused(tmp_path: Path, base: Path) -> None:
    lora = write_lora(tmp_path / "lora", base)
    recorded = source_files(read(lora), describe_base(str(base)))
    compare_sources(recorded, recorded)
    edit_tensors(lora / "adapter_model.safetensors", lambda t: next(iter(t.values())).add_(1))
    with pytest.raises(UserError, match=r"adapter_model.safetensors of expert:lora is not the file") as caught:
        compare_sources(recorded, source_files(read(lora), describe_base(str(base))))
    assert caught.value.code == "E_DIGEST"
    with pytest.raises(UserError, match="no such file"):
        compare_sources(recorded, recorded[1:])
    with pytest.raises(UserError, match="an additional file"):
        compare_sources(recorded[1:], recorded)


def test_importing_checkpoints_loads_neither_transformers_nor_peft() -> None:
    code = "import sys, exporter.checkpoints; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
