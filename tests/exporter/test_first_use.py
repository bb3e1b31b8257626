"""What a new user meets: sizes in config.json, padding tokens, and what `inspect` promises."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from exporter import AdapterSource, BuildSpec, ExportError
from exporter.adapters import LoraDelta
from exporter.build_bundle import build
from exporter.checkpoints.save_lora import write_lora as save_lora
from exporter.commands.engine_options import capabilities
from exporter.inputs import read_inputs
from exporter.inspect import inspect_checkpoint
from exporter.rounding import operators
from exporter.spec import DType
from runtime import MachineError, load
from runtime.bundle import open_bundle
from tests.exporter.checkpoint_makers import edit_json, write_base, write_lora
from tests.exporter.test_adapter_kinds import assert_is_peft, peft_logits
from tests.exporter.test_adapter_kinds import logits_of as answers_of
from tests.exporter.tiny_builds import difference, named_sources, quick, write_lively_base

MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 with a padding token": ("gpt2", {"pad_token_id": 0}),
    "llama with a padding token": ("llama", {"pad_token_id": 0}),
    "multi-head latent attention": ("deepseek_v3", MLA | {"first_k_dense_replace": 2}),
    "nemotron": ("nemotron", {}),
    "stablelm": ("stablelm", {}),
}


@pytest.mark.parametrize("name", BASES)
def test_inspect_and_build_agree(name: str, tmp_path: Path) -> None:
    family, sizes = BASES[name]
    base = write_base(tmp_path / "base", family, **sizes)
    targets = {"gpt2": ["c_attn"], "deepseek_v3": ["o_proj"]}.get(family, ["q_proj"])
    lora = write_lora(tmp_path / "lora", base, targets)
    refusals: list[str] = []
    try:
        read_inputs(BuildSpec(adapters=(AdapterSource(lora),)))
    except ExportError as error:
        refusals = [str(error)]
    assert inspect_checkpoint(base).problems == inspect_checkpoint(lora).problems == refusals
    assert bool(refusals) == (name not in ("gpt2 with a padding token", "llama with a padding token"))


@pytest.mark.parametrize("value", [0, [48, 48]])
def test_sizes_that_transformers_takes_pass(value: Any, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    edit_json(base / "config.json", num_local_experts=value)
    assert inspect_checkpoint(base).problems == []


@pytest.mark.parametrize("value", [-1, 1 << 40, [], [48, -1], [48, 1 << 40], [1] * 600, ["48"], "48", True, 48.0])
def test_absurd_sizes_are_refused(value: Any, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    edit_json(base / "config.json", intermediate_size=value)
    assert "field intermediate_size is refused" in str(inspect_checkpoint(base).problems)


def test_gpt2_with_a_padding_token_is_peft(tmp_path: Path) -> None:
    """GPT-2 has none of its own, so who trained it with batches has set one."""
    base = write_lively_base(tmp_path / "base", "gpt2", pad_token_id=3)
    lora = write_lora(tmp_path / "lora", base, ("c_attn",), fan_in_fan_out=True)
    bundle = build(replace(quick(named_sources({"one": lora}), base), out=tmp_path / "bundle", onnxruntime=False))
    expected = peft_logits(base, lora)
    assert_is_peft(answers_of(bundle, "dynamic", {"one": 1.0}), expected)
    assert difference(answers_of(bundle, "dynamic", {}), expected) > 0.05


def test_a_bfloat16_bundle_on_a_cpu_is_a_machines_lack(tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 products there; the message says what to do, and the exit code is the machine's."""
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    lora = write_lora(tmp_path / "lora", base)
    spec = replace(quick(named_sources({"one": lora}), base), dtype=DType.BFLOAT16, out=tmp_path / "bundle")
    bundle = build(spec)
    with pytest.raises(MachineError, match=r"it has no kernel.*--dtype float32") as found, load(bundle.root):
        pass
    assert found.value.exit_code == 3


COMMANDS = {
    "inspect": ["inspect", "{base}"],
    "build": ["build", "--base", "{base}", "--adapters", "one={lora}", "--verify", "quick", "--out", "{out}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_exporter_leaves_no_traceback_where_nothing_can_be_printed(name: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    places = {"base": base, "lora": write_lora(tmp_path / "lora", base), "out": tmp_path / "bundle"}
    words = [sys.executable, "-m", "exporter", *(word.format(**places) for word in COMMANDS[name])]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    if name == "build":  # what was published stays, and is whole
        assert open_bundle(tmp_path / "bundle").manifest.experts[0].name == "one"


def graph_of(*ops: tuple[str, bool, bool]) -> ir.Model:
    x, limit = ir.val("x"), ir.val("limit")
    nodes = [
        ir.node(op, [x, limit if low else None, limit if high else None] if op == "Clip" else [x, limit])
        for op, low, high in ops
    ]
    return ir.Model(ir.Graph([x, limit], [], nodes=nodes), ir_version=10)


def test_a_clip_with_one_limit_is_a_min_or_a_max_and_nothing_else() -> None:
    names = [operators(graph_of(each)) for each in (("Clip", False, True), ("Min", True, True))]
    assert names[0] == names[1] == ["Min"]
    assert operators(graph_of(("Clip", True, False))) == ["Max"]
    assert operators(graph_of(("Clip", True, True))) == ["Clip"]


def test_a_saved_adapter_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_lora(tmp_path, {"q_proj": LoraDelta(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_capabilities_with_commas_and_spaces() -> None:
    assert capabilities("8.6,8.9") == capabilities(" 8.6 8.9,") == ("8.6", "8.9")
    for text in ("", ",", "x", "8", "8.6;8.9", "nan", "８.6", "8.66", "1e5"):
        with pytest.raises(Exception, match="need compute capabilities such as"):
            capabilities(text)


@pytest.mark.parametrize("field", ["adapters", "base", "gate", "modes", "mix", "out", "threads", "dtype", "prompts"])
def test_a_build_refuses_other_types_by_field(field: str) -> None:
    for value in (object(), 3.5, [3.5]):
        with pytest.raises(ExportError, match=field):
            BuildSpec(**{field: value})
