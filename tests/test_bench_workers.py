"""Real workers of scripts/bench on a tiny model: ours and PEFT; with a package index and `long`, all peers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scripts.bench import main
from scripts.benchmark.environments import EnvironmentMissingError, Environments
from scripts.benchmark.layouts import Models
from scripts.benchmark.limit import checkpoint_weights, graph_weights
from scripts.benchmark.rounds import Running, Starter
from scripts.benchmark.subjects import FULL, SUBJECTS, Cost
from scripts.benchmark.workers.run_peft import load_peft
from scripts.benchmark.workers.serve import Clock
from tests.exporter.checkpoint_makers import edit_tensors

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("hidden=32", "blocks=1", "intermediate=64", "heads=4", "kv-heads=2", "vocab=256", "positions=128", "rank=4")
OPTIONS = tuple(word for size in SIZES for word in ("--" + size.split("=")[0], size.split("=")[1]))
EXPERTS = 3
BY_NAME = {subject.name: subject for subject in SUBJECTS}
PROMPTS = [[5, 17, 200, 33], [9, 8, 7, 6]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A tiny model whose experts are loud enough that each of them changes tokens."""
    folder = tmp_path_factory.mktemp("models") / f"{EXPERTS}-experts"
    models = Models(folder, EXPERTS, Environments(folder, may_install=False), OPTIONS)
    for expert in (models.path("checkpoint") / "experts").iterdir():
        edit_tensors(expert / "adapter_model.safetensors", lambda tensors: scale(tensors, 30.0))
    return models


def scale(tensors: dict[str, torch.Tensor], factor: float) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = tensors[name] * factor


def start(name: str, models: Models, log: Path) -> Running:
    worker, versions = Starter(1, log)(BY_NAME[name], models)
    assert versions
    return worker


def tokens(worker: Running) -> list[list[int]]:
    answer = worker.ask({"do": "generate", "prompts": PROMPTS, "new_tokens": 6})
    assert all(later > earlier > 0 for earlier, later in zip(answer["seconds"], answer["seconds"][1:], strict=False))
    rows: list[list[int]] = answer["tokens"]
    return rows


def test_a_run_of_ours_and_peft(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From options to the page; everybody gives the same tokens."""
    cases = ["--contexts", "2", "8", "--batches", "2", "--experts", str(EXPERTS), "--new-tokens", "6", "--rounds", "1"]
    names = ["X-LoRA exact", "X-LoRA paired", "X-LoRA paired, experts x0", "plain base", "base in the dynamic graph"]
    names += ["PEFT X-LoRA", "ORT GenAI base fp32"]
    code = main([
        *cases, "--only", *names, "--threads", "1", "--no-install", "--environments", str(tmp_path / "none"),
        "--models", str(models.folder.parent), "--sizes", *SIZES, "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["failures"] == []
    [missing] = found["left_out"]
    assert (missing["subject"], "--no-install" in missing["message"]) == ("ORT GenAI base fp32", True)
    assert all(each["is_same"] for each in found["agreement"] if each["subject"] != "X-LoRA paired, experts x0")
    held = {(agreement["subject"], agreement["reference"]) for agreement in found["agreement"]}
    exact = {(name, "X-LoRA exact") for name in ("PEFT X-LoRA", "X-LoRA paired", "X-LoRA paired, experts x0")}
    assert held == exact | {("base in the dynamic graph", "plain base")}
    assert len(found["series"]) == 6 * 4  # contexts 2 and 8, the batch, the experts' one
    accepted = {series["accepted"] for series in found["series"] if series["subject"] == "X-LoRA paired, experts x0"}
    assert accepted == {1.0}, "the base drafts what the base without experts says"
    assert {series["accepted"] for series in found["series"] if series["subject"] == "X-LoRA exact"} == {None}
    assert min(min(series["step_ms"]) for series in found["series"]) > 0
    assert set(found["setting"]["builds"][str(EXPERTS)]["peak_bytes"]) == {"anonymous", "mapped"}
    text = (tmp_path / "out" / "performance.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    for plot in ("context", "limit"):
        assert (tmp_path / "out" / f"performance-{plot}.svg").read_text().startswith("<?xml")


def test_the_experts_matter_and_a_dropped_one_is_seen(models: Models, tmp_path: Path) -> None:
    """What the bench calls agreement would be lost."""
    exact, plain = start("X-LoRA exact", models, tmp_path), start("plain base", models, tmp_path)
    ours = tokens(exact)
    margins = exact.ask({"do": "margins", "prompt": PROMPTS[1], "tokens": ours[1]})["margins"]
    assert len(margins) == 6
    assert min(margins) > 1e-3, "far from a tie, so that equal tokens say something"
    assert ours != tokens(plain)
    exact.close()
    plain.close()
    spoiled = Models(tmp_path / "spoiled", EXPERTS, models.environments)
    shutil.copytree(models.path("checkpoint"), spoiled.folder / "checkpoint")
    edit_tensors(spoiled.path("checkpoint") / "experts" / "e1" / "adapter_model.safetensors", lambda t: scale(t, 0.0))
    peft = load_peft({"model": spoiled.path("checkpoint"), "threads": 1})  # here: a process needs seconds to start
    assert peft.generate(PROMPTS, 6, Clock(2)) != ours


def test_a_graph_reads_what_the_checkpoint_says(models: Models) -> None:
    """The static graph once the base; the dynamic one, in each pass, base, experts and gate, but the head once."""
    checkpoint, bundle = models.path("checkpoint"), models.path("bundle")
    base = checkpoint_weights(checkpoint, Cost.BASE)
    static, dynamic, form = (graph_weights(bundle / f"{n}.onnx") for n in ("static", "dynamic", "dynamic.ort"))
    assert (form.always, form.for_logits) == pytest.approx((dynamic.always, dynamic.for_logits), rel=0.01)
    assert static.always + static.for_logits == pytest.approx(base, rel=0.02)
    with safe_open(checkpoint / "xlora" / "adapter_model.safetensors", framework="numpy") as tensors:
        gate = sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118 - it is no dict
    twice = checkpoint_weights(checkpoint, Cost.UNCACHED_XLORA) + gate
    assert dynamic.for_logits == pytest.approx(32 * 256 * 4, rel=0.01)  # the head; a shape or two
    assert 2 * (dynamic.always + dynamic.for_logits) == pytest.approx(twice, rel=0.02)
    cached = checkpoint_weights(checkpoint, Cost.CACHED_XLORA)
    assert 2 * base - dynamic.for_logits < cached < twice - dynamic.for_logits


@pytest.mark.long
def test_all_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each peer that can run a case gives the tokens that it promises; each that cannot says why."""
    environments = Environments(ROOT / ".bench")
    for name in ("genai", "mistralrs"):
        try:
            environments.python(name)
        except EnvironmentMissingError as error:
            pytest.skip(f"{name} cannot be installed: {error}")
    wide = {"hidden": 64, "intermediate": 128, "positions": 256, "vocab": 1024, "blocks": 2, "heads": 4, "kv-heads": 2}
    sizes = [f"{name}={number}" for name, number in wide.items()]
    options = ["--contexts", "1", "16", "--batches", "1", "4", "--experts", "4", "--new-tokens", "6", "--rounds", "1"]
    assert main([*options, "--sizes", *sizes, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["left_out"] == []
    ran = {(series["subject"], series["context"], series["batch"]) for series in found["series"]}
    assert {name for name, *_ in ran} == set(BY_NAME)
    for agreement in found["agreement"]:
        assert agreement["is_same"] or BY_NAME[agreement["subject"]].computes.startswith("near"), agreement
    cannot = {"mistral.rs X-LoRA", "mistral.rs X-LoRA, frozen after 1"}
    assert {failure["subject"] for failure in found["failures"]} == cannot
    for failure in found["failures"]:
        assert (failure["context"], "does not match token count" in failure["message"]) == (16, True)
    assert ("mistral.rs X-LoRA", 1, 1) in ran
    assert FULL.contexts[0] == 1, "else nothing of it would be measured"
