"""What scripts/bench makes of its samples: statistics, the memory floor, tables, plots, the page; and its options."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from scripts.bench import main
from scripts.benchmark.environments import Environments
from scripts.benchmark.layouts import FORMS, Models, word_tokenizer
from scripts.benchmark.limit import Bandwidth, GraphWeights, Reads, compiled_read, graph_weights, reads_of
from scripts.benchmark.machine import this_machine
from scripts.benchmark.plots import draw
from scripts.benchmark.ratios import ratio_rows
from scripts.benchmark.report import as_json, page
from scripts.benchmark.results import Results, step_milliseconds, summary
from scripts.benchmark.subjects import FULL, SUBJECTS, Case, Computes, Subject, Sweep
from scripts.benchmark.tables import Found, limit_rows, step_rows, throughput_rows
from tests.bench_fakes import GATED, Fakes, measured, write_models

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def models(tmp_path: Path) -> dict[int, Models]:
    """Of both numbers of experts."""
    return write_models(tmp_path)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_medians_quartiles_and_what_a_sample_is() -> None:
    found = summary([5.0, 1.0, 2.0, 3.0, 100.0])
    assert (found.low, found.median, found.high, found.count) == (2.0, 3.0, 5.0, 5)
    one = summary([7.0])
    assert (one.low, one.median, one.high) == (7.0, 7.0, 7.0)
    # prefill 1 s, the step that binds memory 0.5 s, then 10 ms and 30 ms
    assert step_milliseconds([1.0, 1.5, 1.51, 1.54]) == pytest.approx(20.0)


# --- the physical limit -------------------------------------------------------------------------------------------

GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
g (int64[S] ids, float[B, C, 8] past) => (float[S, 50] logits, float[S, 8] present)
{
    x = Gather(embedding, ids)
    present = MatMul(x, key)
    y = MatMul(present, up)
    z = MatMul(y, down)
    wide = Cast<to = 1>(head)
    logits = MatMul(z, wide)
}
"""
WEIGHTS = {"embedding": (50, 8), "key": (8, 8), "up": (8, 16), "down": (16, 8), "head": (8, 50)}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """key is read always, up, down and the float16 head for logits; the embedding by row."""
    model = parser.parse_model(GRAPH)
    for name, shape in WEIGHTS.items():
        dtype = np.float16 if name == "head" else np.float32
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, dtype), name))
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_bytes_are_counted_in_the_graph(graph: Path) -> None:
    assert graph_weights(graph) == GraphWeights(always=64 * 4, for_logits=(128 + 128) * 4 + 400 * 2)


def test_each_pass_reads_the_graph_and_the_last_one_the_head(graph: Path, tmp_path: Path) -> None:
    """A model of 3 blocks and 2 K/V heads of 4 numbers."""
    config = {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 4}
    folder = tmp_path / "models"
    (folder / "checkpoint" / "base").mkdir(parents=True)
    (folder / "checkpoint" / "base" / "config.json").write_text(json.dumps(config))
    models = Models(folder, 4, Environments(tmp_path))
    (folder / "bundle").symlink_to(graph.parent)
    once = Subject("once", "fake", Computes.BASE, "bundle", graph=graph.name)
    twice = replace(once, computes=Computes.XLORA, passes=2)
    assert reads_of(once, models) == Reads(256 + 1824, 2 * 3 * 2 * 4 * 4)
    assert reads_of(twice, models) == Reads(2 * 256 + 1824, 2 * (2 * 3 * 2 * 4 * 4))
    assert reads_of(replace(once, cache_bytes=0), models).cache == 0


def test_the_floor_is_bytes_over_bandwidth(models: dict[int, Models]) -> None:
    assert Reads(1000, 10).of_step(context=64, batch=8) == 1000 + 8 * 64 * 10
    found = measured(models, Fakes())
    case = Case(8, 2, 4, 4)
    assert found.floor(GATED, case) == pytest.approx((10**7 + 2 * (8 + 2) * 1000) / 2e9 * 1e3)
    [row] = [row for row in limit_rows(found) if row[""] == "gated"]
    assert (row["context"], row["floor, ms"], row["measured, ms"], row["measured / floor"]) == (
        "8",
        "5.00",
        "10.0",
        "2.00",
    )
    assert row["MB read a token"] == "10.0"


def test_bandwidth_reads_every_word(tmp_path: Path) -> None:
    words = np.random.default_rng(0).integers(0, 2**63, 1003, np.uint64)
    read = compiled_read(tmp_path)
    if read is not None:
        assert read(words) == np.bitwise_xor.reduce(words)
    bandwidth = Bandwidth(2, tmp_path, size=2**20)
    assert bandwidth.way == ("numpy" if read is None else "C")
    assert 0 < bandwidth.sample() < 1e12


def test_without_a_compiler_numpy_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    bandwidth = Bandwidth(1, tmp_path, size=2**20)
    assert bandwidth.way == "numpy"
    assert bandwidth.sample() > 0


# --- tables, plots and the page -----------------------------------------------------------------------------------


def test_the_page_of_a_run(models: dict[int, Models], tmp_path: Path) -> None:
    fakes = Fakes(
        {"plain": {"seconds": 0.004}, "peer": {"fails_at": lambda c, b: "one | row only" if b > 1 else ""}},
    )
    found = measured(models, fakes)
    plots = draw(found, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == sorted(plots.values())
    assert set(plots) == {*Sweep, "limit"}
    setting = {"quick": False, "threads": 2, "hidden": 8, "blocks": 1, "vocabulary": 50}
    machine = replace(this_machine(), load=0.0)
    text = page(found, machine, setting, plots)
    assert "| gated | 10.0 (10.0 to 10.0) | 10.0 (10.0 to 10.0) |" in text
    assert "| plain | 4.00 (4.00 to 4.00) |" in text
    assert "| peer | 10.0 (10.0 to 10.0) | – |" in text
    assert r"| peer | context 8, batch 2, 4 experts | one \| row only |" in text
    assert "| gated | 2 | 3 | 5 |" not in text
    assert "| gated | 2 | 3 | 2 | 5 |" in text  # MiB
    for plot in plots.values():
        assert f"({plot})" in text
    assert "quoted" not in text
    assert "do not quote" in page(found, replace(machine, load=3.0), setting, plots)
    assert "A smoke run" in page(found, machine, setting | {"quick": True}, plots)
    assert machine.date in text
    assert "package 1.0" in text
    again = json.loads(json.dumps(as_json(found, machine, setting)))
    [series] = [s for s in again["series"] if (s["subject"], s["context"], s["batch"]) == ("plain", 8, 2)]
    assert series["step_ms"] == pytest.approx([4.0] * 3)
    assert again["failures"][0]["message"] == "one | row only"


def test_the_same_figures_make_the_same_plots(models: dict[int, Models], tmp_path: Path) -> None:
    found = measured(models, Fakes())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        draw(found, tmp_path / name)
    for plot in (tmp_path / "one").iterdir():
        assert plot.read_bytes() == (tmp_path / "two" / plot.name).read_bytes()


def test_experts_are_swept_only_over_what_has_experts(models: dict[int, Models]) -> None:
    found = measured(models, Fakes())
    assert [row[""] for row in step_rows(found, Sweep.EXPERTS)] == ["gated", "peer"]
    assert list(step_rows(found, Sweep.EXPERTS)[0]) == ["", "4", "2"]
    [row] = [row for row in throughput_rows(found) if row[""] == "gated"]
    assert (float(row["1"]), float(row["2"])) == (100, 200)


def test_ratios_of_the_aims_are_of_medians() -> None:
    results, plan = Results(), FULL
    times = {
        ("PEFT X-LoRA", 256): 900.0, ("X-LoRA exact", 256): 20.0, ("X-LoRA exact", 64): 18.0, ("plain base", 64): 10.0,
        ("ORT GenAI base fp32", 64): 8.0, ("X-LoRA exact", 2048): 26.0, ("X-LoRA exact", 128): 20.0,
        ("mistral.rs X-LoRA", 1): 32.0, ("X-LoRA exact", 1): 16.0, ("X-LoRA paired, experts x0", 64): 12.0,
        ("X-LoRA paired", 64): 14.0, ("X-LoRA frozen", 64): 11.0,
    }  # fmt: skip
    for (name, context), time in times.items():
        results.step[name, plan.sweep(Sweep.CONTEXT)[context]] = [time]
    results.step["X-LoRA exact", plan.sweep(Sweep.BATCH)[8]] = [36.0]
    results.drafts["X-LoRA paired", plan.sweep(Sweep.CONTEXT)[64]] = [(7, 10), (9, 10)]
    rows = ratio_rows(Found(plan, SUBJECTS, results, {}))
    assert {row["ratio"]: row["measured"] for row in rows} == {
        "PEFT / exact at 256": "45.00",
        "mistral.rs X-LoRA / exact at 1": "2.00",
        "exact / plain base at 64": "1.80",
        "frozen / plain base at 64": "1.10",
        "a paired step of two rows / plain base at 64": "1.20",
        "X-LoRA paired / plain base at 64, 80 % of drafts confirmed": "1.40",
        "plain base / GenAI fp32 at 64": "1.25",
        "exact at 2,048 / at 128": "1.30",
        "tokens/s of 8 rows, exact / 1 row, exact": "4.00",
        "tokens/s of 8 rows, exact / 1 row, mistral.rs X-LoRA at 1": "7.11",
    }


# --- what the peers load, what the list says, bad input -----------------------------------------------------------


def test_the_word_tokenizer_spells_ids() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(word_tokenizer(100)))
    assert tokenizer.encode("w3 w99 w17", add_special_tokens=False).ids == [3, 99, 17]
    assert tokenizer.decode([3, 99, 17]).split() == ["w3", "w99", "w17"]


def test_every_subject_has_a_worker_a_form_and_an_environment() -> None:
    environments = Environments(Path("nowhere"))
    for subject in SUBJECTS:
        assert (ROOT / "scripts" / "benchmark" / "workers" / f"{subject.worker}.py").exists()
        assert subject.model in FORMS
        assert subject.environment in environments.known
    assert len({subject.name for subject in SUBJECTS}) == len(SUBJECTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nobody"], r"--only; got 'nobody'; need some of: X-LoRA exact, X-LoRA paired"),
        (
            ["--rounds", "0", "--contexts", "64", "0"],
            r"(?s)2 problems.*--contexts; got \[64, 0\].*--rounds; got 0",
        ),
        (["--new-tokens", "2"], "--new-tokens; got 2; need at least 3"),
        (["--threads", "0"], "--threads; got 0; need at least 1"),
        (["--sizes", "width=3"], "--sizes; got 'width=3'; need NAME=N with a name of: hidden"),
        (["--sizes", "hidden=x"], "--sizes; got 'hidden=x'"),
    ],
)
def test_bad_options_are_one_clear_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*words, "--out", str(out), "--environments", str(tmp_path / "environments")]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert "Traceback" not in captured.err
    assert not out.exists()
    assert not (tmp_path / "environments").exists()
