"""`exporter inspect`: the report tells what is used and what is refused, and never raises on bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.inspect import inspect_checkpoint, render
from tests.exporter.checkpoint_makers import (
    edit_json,
    write_adalora,
    write_base,
    write_dora,
    write_experts,
    write_xlora_original,
    write_xlora_peft_damaged,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("inspect") / "base")


def test_a_damaged_xlora_is_shown_with_its_repair(tmp_path: Path, base: Path) -> None:
    experts = write_experts(tmp_path, base, 3)
    write_xlora_peft_damaged(tmp_path / "x", base, experts, layerwise_scalings=True, top_k_lora=2)
    text = render(inspect_checkpoint(tmp_path / "x"))
    for part in (
        "X-LoRA (PEFT layout)", "1 Linear: 32 -> 12", "one set per token and module (4)", "repaired bit-exactly",
        "skill1  1    lora  3     4", f"{tmp_path}/skill1", "llama, 2 blocks, hidden 32", "can be exported",
    ):  # fmt: skip
        assert part in text
    assert "refused" not in text


def test_refusals_are_listed_and_the_rest_still_shown(tmp_path: Path, base: Path) -> None:
    experts = write_experts(tmp_path, base, 2)
    folder = write_xlora_original(tmp_path / "x", base, experts, enable_softmax_topk=True, top_k_lora=1)
    report = inspect_checkpoint(folder)
    assert len(report.experts) == 2
    assert len(report.problems) == 1
    assert "--topk-softmax token" in render(report)
    assert "can be exported" not in render(report)


def test_every_problem_has_its_line(tmp_path: Path, base: Path) -> None:
    (lora,) = write_experts(tmp_path, base, 1)
    assert inspect_checkpoint(lora).problems == []
    edit_json(lora / "adapter_config.json", use_qalora=True, lora_bias=True)
    assert [problem.split(": ")[1].split(" ")[0] for problem in inspect_checkpoint(lora).problems] == [
        "lora_bias",
        "use_qalora",
    ]


def test_kinds_and_replaced_weights_are_shown(tmp_path: Path, base: Path) -> None:
    config = {"modules_to_save": ["lm_head"]}
    dora = render(inspect_checkpoint(write_dora(tmp_path / "dora", base, ("q_proj",), **config)))
    assert ["0", "dora", "dora", "dora", "3"] in [line.split()[:5] for line in dora.splitlines()]
    assert "note: expert dora replaces lm_head.weight: for static builds of dora=1 only" in dora
    ada = render(inspect_checkpoint(write_adalora(tmp_path / "ada", base, ("q_proj",))))
    assert ["0", "ada", "ada", "adalora", "4"] in [line.split()[:5] for line in ada.splitlines()]
    for text in (dora, ada):
        assert "can be exported" in text


def test_base_folders_and_rubbish(tmp_path: Path, base: Path) -> None:
    report = inspect_checkpoint(base)
    assert report.kind == "base model"
    assert ("vocabulary", "64") in report.facts
    assert report.problems == []
    assert inspect_checkpoint(tmp_path / "nowhere").problems
    assert "holds no adapter" in inspect_checkpoint(tmp_path).problems[0]
    assert inspect_checkpoint(Path("a\0b")).problems
