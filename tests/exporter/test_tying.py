"""One weight or two: config.json, transformers' loader and PEFT may each say otherwise; bundles follow PEFT itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from exporter.build_bundle import build
from exporter.checkpoints import describe_base, load_base, load_blank
from exporter.inputs import read_inputs
from exporter.parts import load_parts
from exporter.shards import kept_shards
from exporter.spec import DType
from runtime.bundle import open_bundle
from runtime.errors import InputError
from runtime.manifest import Mode, VerifyLevel
from tests.exporter.checkpoint_makers import edit_json, edit_tensors, write_adapter, write_dora
from tests.exporter.peft_models import logits_of, peft_lora
from tests.exporter.test_adapter_kinds import TOKENS, assert_is_peft, spec_of
from tests.exporter.test_adapter_kinds import logits_of as bundle_logits
from tests.exporter.tiny_builds import DECODERS, difference, reference_of, write_lively_base

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = [TOKENS[0], 5, TOKENS[3]]
SIZES: dict[str, Any] = {"num_hidden_layers": 1}


def two_equal(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBED].clone()


def head_only(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBED)


# What config.json says, what the file holds -> (base says tied by config, once loaded, to PEFT)
Ties = tuple[bool, bool, bool]
BASES: dict[str, tuple[bool, bool, Callable[[dict[str, torch.Tensor]], None] | None, Ties]] = {
    "apart": (False, False, None, (False, False, False)),
    "tied": (True, True, None, (True, True, True)),
    "tied, head stored": (True, True, head_only, (True, True, True)),
    "tied, two equal": (True, True, two_equal, (True, True, True)),
    "tied, two that differ": (False, True, None, (True, False, True)),
    "apart, two equal": (True, False, two_equal, (False, False, False)),
}

# The adapter -> LoraConfig's settings.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora head": {"target_modules": ["q_proj", "lm_head"]},
    "lora both": {"target_modules": ["embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": ROWS},
    "rows of embedding": {"trainable_token_indices": {"embed_tokens": ROWS}},
    "rows of head": {"trainable_token_indices": {"lm_head": ROWS}},
    "rows of both": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}},
    "other rows of both": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [1, 7]}},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved both": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def write_tied(folder: Path, kind: str, family: str = "qwen2", **sizes: Any) -> Path:
    """A tiny base of one of the kinds of tying."""
    made_tied, says_tied, change, _ = BASES[kind]
    base = write_lively_base(folder, family, tie_word_embeddings=made_tied, **SIZES | sizes)
    if change is not None:
        edit_tensors(base / "model.safetensors", change)
    edit_json(base / "config.json", tie_word_embeddings=says_tied)
    return base


def write_ends(folder: Path, base: Path, adapter: str, **more: Any) -> Path:
    settings = {"target_modules": ["q_proj"]} | ADAPTERS[adapter] | more
    return write_adapter(folder, base, LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **settings), seed=6)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> its base, written on first use."""
    root, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_tied(root / f"base{len(made)}", kind)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", BASES)
def test_who_says_that_both_are_one(kind: str, bases: Callable[[str], Path]) -> None:
    base = describe_base(str(bases(kind)))
    assert base.tying is not None
    assert (base.tying.embedding, base.tying.head) == (EMBED, HEAD)
    assert (base.tying.by_config, base.tying.by_loader, base.tying.by_peft) == BASES[kind][3]
    assert any("the files hold two that differ" in note for note in base.notes) == (kind == "tied, two that differ")


@pytest.mark.parametrize("kind", BASES)
def test_the_oracle_is_peft_however_ends_are_tied(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """All adapters; what the adapter changes at the ends matters to PEFT's logits."""
    base = bases(kind)
    for number, adapter in enumerate(ADAPTERS):
        path = write_ends(tmp_path / str(number), base, adapter)
        expected = logits_of(peft_lora(base, path), TOKENS)
        inputs = read_inputs(spec_of(base, {"one": path}, Mode.STATIC, {"one": 1.0}))
        parts = load_parts(inputs)
        found = reference_of(parts).constant([1.0], TOKENS).logits
        assert difference(found, expected) < 2e-5, (kind, adapter)
        [expert] = inputs.adapters.experts
        deltas = {name: delta for name, delta in expert.deltas.items() if "q_proj" in name}
        plain = replace(inputs.adapters, experts=(replace(expert, replacements={}, deltas=deltas),))
        assert difference(reference_of(parts, plain).constant([1.0], TOKENS).logits, expected) > 1e-2, (kind, adapter)


# What each rule decides in CI; all pairs in the long run. True: built on the structure's proof, too.
DIAGONAL = {
    ("tied, two that differ", "rows"): True,
    ("tied", "rows of head"): True,
    ("tied", "other rows of both"): False,
    ("tied, head stored", "lora head"): True,
    ("tied, two equal", "saved head"): False,
}
REST = [pair for pair in ((kind, name) for kind in BASES for name in ADAPTERS) if pair not in DIAGONAL]


@pytest.mark.parametrize(
    ("kind", "adapter"), [*DIAGONAL, *(pytest.param(*pair, marks=pytest.mark.long) for pair in REST)]
)
def test_static_bundles_are_peft_however_ends_are_tied(
    kind: str, adapter: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(kind)
    path = write_ends(tmp_path / "one", base, adapter)
    expected = logits_of(peft_lora(base, path), TOKENS)
    spec = spec_of(base, {"one": path}, Mode.STATIC, {"one": 1.0})
    bundle = build(replace(spec, out=tmp_path / "quick"))
    assert_is_peft(bundle_logits(bundle, "static", None), expected)
    if DIAGONAL.get((kind, adapter), True):
        trusted = build(replace(spec, verify=VerifyLevel.STRUCTURE, out=tmp_path / "structure"))
        assert_is_peft(bundle_logits(trusted, "static", None), expected)


@pytest.mark.long
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name.startswith("lora")])
def test_dynamic_bundles_are_peft_however_ends_are_tied(
    kind: str, adapter: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(kind)
    path = write_ends(tmp_path / "one", base, adapter)
    expected = logits_of(peft_lora(base, path), TOKENS)
    for level in (VerifyLevel.QUICK, VerifyLevel.STRUCTURE):
        spec = replace(spec_of(base, {"one": path}, Mode.DYNAMIC), verify=level)
        bundle = build(replace(spec, out=tmp_path / level))
        assert_is_peft(bundle_logits(bundle, "dynamic", {"one": 1.0}), expected)


@pytest.mark.long
@pytest.mark.parametrize("kind", BASES)
def test_rounded_bundles_pass_their_proof(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """A float16 build proves its fp32 twin against the reference, which the tests above hold to PEFT."""
    base = bases(kind)
    for name in ("rows", "other rows of both", "saved head", "lora both"):
        path = write_ends(tmp_path / name, base, name)
        spec = spec_of(base, {"one": path}, Mode.STATIC, {"one": 1.0})
        bundle = build(replace(spec, dtype=DType.FLOAT16, out=tmp_path / f"bundle {name}"))
        assert all(check.passed for report in bundle.manifest.reports for check in report.checks)


# --- what is refused, and what ensure_weight_tying does ---


@pytest.mark.parametrize("kind", ["apart", "tied", "tied, two that differ"])
def test_ensured_ties_are_pefts(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """unsloth sets ensure_weight_tying for every tied base; LoRAs of both ends are then one, turned."""
    base = bases(kind)
    adapters = ("rows", "rows of both", "saved embedding", "saved head", "saved both", "lora head")
    for number, adapter in enumerate(adapters):
        path = write_ends(tmp_path / str(number), base, adapter, ensure_weight_tying=True)
        if adapter == "lora head" and kind != "apart":
            edit_tensors(path / "adapter_model.safetensors", turn_the_head)
        expected = logits_of(peft_lora(base, path), TOKENS)
        parts = load_parts(read_inputs(spec_of(base, {"one": path}, Mode.STATIC, {"one": 1.0})))
        assert difference(reference_of(parts).constant([1.0], TOKENS).logits, expected) < 2e-5, adapter


def turn_the_head(tensors: dict[str, torch.Tensor]) -> None:
    """What training leaves: PEFT's two parameters share their memory, which the makers' noise does not."""
    prefix, embed = "base_model.model.", "base_model.model.model.embed_tokens"
    tensors[f"{prefix}lm_head.lora_A.weight"] = tensors[f"{embed}.lora_embedding_B"].T.contiguous()
    tensors[f"{prefix}lm_head.lora_B.weight"] = tensors[f"{embed}.lora_embedding_A"].T.contiguous()


def test_ties_that_cannot_be_followed_are_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    tied, apart = bases("tied"), bases("apart")

    def refusal(base: Path, path: Path) -> str:
        with pytest.raises(InputError) as caught:
            read_inputs(spec_of(base, {"one": path}, Mode.STATIC, {"one": 1.0}))
        return str(caught.value)

    loras = write_ends(tmp_path / "loras", tied, "lora head", ensure_weight_tying=True)
    assert "another LoRA of lm_head than of model.embed_tokens" in refusal(tied, loras)
    edit_tensors(loras / "adapter_model.safetensors", turn_the_head)
    assert "which the base's config.json does not tie" in refusal(apart, loras)
    saved = write_ends(tmp_path / "saved", tied, "saved head", ensure_weight_tying=True)
    edit_tensors(saved / "adapter_model.safetensors", lambda t: t["base_model.model.lm_head.weight"].mul_(2))
    assert "other values of lm_head.weight than of model.embed_tokens.weight" in refusal(tied, saved)
    rows = write_ends(tmp_path / "rows", tied, "rows of both")
    assert "no token_adapter of lm_head" in refusal(apart, rows)
    other = write_ends(tmp_path / "other", tied, "other rows of both")
    edit_json(other / "adapter_config.json", ensure_weight_tying=True)
    assert "other token ids for the head" in refusal(tied, other)


# --- other forms of the same files ---


@pytest.mark.parametrize("suffix", [".weight", ".default.weight"])
def test_magnitudes_under_other_names_are_pefts(suffix: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("apart")
    path = write_dora(tmp_path / "dora", base, ("q_proj", "down_proj"))
    expected = logits_of(peft_lora(base, path), TOKENS)
    edit_tensors(path / "adapter_model.safetensors", lambda tensors: rename_magnitudes(tensors, suffix))
    assert difference(logits_of(peft_lora(base, path), TOKENS), expected) == 0
    parts = load_parts(read_inputs(spec_of(base, {"one": path}, Mode.DYNAMIC)))
    assert difference(reference_of(parts).constant([1.0], TOKENS).logits, expected) < 2e-5


def rename_magnitudes(tensors: dict[str, torch.Tensor], suffix: str) -> None:
    for key in [key for key in tensors if key.endswith("lora_magnitude_vector")]:
        tensors[f"{key}{suffix}"] = tensors.pop(key)


def test_a_whole_model_beside_the_lora_must_be_the_base(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base, change = bases("apart"), dict[str, torch.Tensor]()
    path = write_ends(tmp_path / "lora", base, "lora head")
    expected = logits_of(peft_lora(base, path), TOKENS)
    for key, value in load_file(base / "model.safetensors").items():
        module, _, leaf = key.rpartition(".")
        middle = ".base_layer" if module.endswith(("q_proj", "lm_head")) else ""
        change[f"base_model.model.{module}{middle}.{leaf}"] = value
    edit_tensors(path / "adapter_model.safetensors", lambda tensors: tensors.update(change))
    assert difference(logits_of(peft_lora(base, path), TOKENS), expected) == 0
    inputs = read_inputs(spec_of(base, {"one": path}, Mode.DYNAMIC))
    assert any("is saved beside the LoRA and equals the base's" in note for note in inputs.notes)
    found = reference_of(load_parts(inputs)).constant([1.0], TOKENS).logits
    assert difference(found, expected) < 2e-5
    norm = "base_model.model.model.norm.weight"
    edit_tensors(path / "adapter_model.safetensors", lambda tensors: tensors[norm].mul_(1.5))
    with pytest.raises(InputError, match=r"model\.norm\.weight replaces a tensor of the base"):
        read_inputs(spec_of(base, {"one": path}, Mode.DYNAMIC))


# --- what `blank` loading and copied shards assume, held to transformers' public loader ---


def assert_read_as_loaded(base: Path) -> bool:
    """Every parameter under each of its names, and every tensor of a copied shard; False where nothing is blank."""
    described = describe_base(str(base))
    public = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = public.state_dict()
    mine = load_base(described, torch.float32)
    assert all(torch.equal(value, state[name]) for name, value in mine.state_dict().items())
    assert mine.state_dict().keys() == state.keys()
    assert described.tied_embeddings == (public.get_output_embeddings().weight is public.get_input_embeddings().weight)
    blank = load_blank(described, torch.bfloat16)
    if blank is None:
        return False
    for name, _ in public.named_parameters(remove_duplicate=False):
        assert torch.equal(blank.read(name), state[name]), name
    for path, names in kept_shards(described, torch.bfloat16, blank).files.items():
        tensors = load_file(path)
        assert tensors.keys() == set(names)
        assert all(torch.equal(tensors[name].float(), state[name]) for name in names)
    return True


@pytest.mark.parametrize("family", DECODERS)
def test_families_are_read_as_transformers_loads_them(family: str, tmp_path: Path) -> None:
    for number, sizes in enumerate(({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False})):
        base = write_lively_base(tmp_path / str(number), family, dtype="bfloat16", **sizes)
        assert assert_read_as_loaded(base) == (family != "mixtral")


@pytest.mark.parametrize("kind", BASES)
def test_ties_are_read_as_transformers_loads_them(kind: str, bases: Callable[[str], Path]) -> None:
    assert assert_read_as_loaded(bases(kind)) == (kind not in ("tied, two equal", "tied, two that differ"))


# --- the order of sets ---

INSPECTED = """
import sys
from pathlib import Path
from exporter.inputs import read_inputs
from exporter.spec import AdapterSource, BuildSpec
for base, path in zip(sys.argv[1::2], sys.argv[2::2]):
    inputs = read_inputs(BuildSpec((AdapterSource(Path(path), "one"),), base))
    print(inputs.notes, list(inputs.base.stored_names), list(inputs.adapters.experts[0].deltas))
"""


def test_no_hash_seed_decides(bases: Callable[[str], Path], tmp_path: Path) -> None:
    folders: list[str] = []
    for kind in ("tied", "tied, two that differ", "tied, head stored"):
        base = bases(kind)
        folders += [str(base), str(write_ends(tmp_path / kind, base, "lora embedding"))]
    command = [sys.executable, "-c", INSPECTED, *folders]
    said = {seed: seeded(command, seed) for seed in (0, 1)}
    assert len(set(said.values())) == 1
    assert said[0].count("is saved beside the LoRA and equals the base's") == 3


@pytest.mark.long
def test_no_hash_seed_decides_a_bundle(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("tied")
    path = write_ends(tmp_path / "one", base, "lora embedding")
    digests = set()
    for seed in (0, 1, 2, 3):
        out = tmp_path / str(seed)
        options = ["--adapters", f"one={path}", "--base", str(base), "--verify", "structure", "--out", str(out)]
        seeded([sys.executable, "-m", "exporter", "build", *options], seed)
        inspected = seeded([sys.executable, "-m", "exporter", "inspect", "--base", str(base), f"one={path}"], seed)
        digests.add((inspected, tuple((file.path, file.sha256) for file in open_bundle(out).manifest.files)))
    assert len(digests) == 1


def seeded(command: Sequence[str], seed: int) -> str:
    env = os.environ | {"PYTHONHASHSEED": str(seed)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
