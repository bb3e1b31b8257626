"""The fuzzer: what it draws, that its cases hold, and that it finds, shrinks and repeats faults planted on purpose."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import ExportError
from runtime.adapter_folder.lora_config import LoraFields
from scripts.fuzz import log, refusals
from scripts.fuzz.draw import CASES_A_HASH_SEED, GENERATION, PURPOSES, draw_case, hash_seed_of
from scripts.fuzz.draw_odd import ODD
from scripts.fuzz.families import FAMILIES
from scripts.fuzz.judge import FINDINGS, Verdict, judge, signature
from scripts.fuzz.repro import write_repro
from scripts.fuzz.run import Settings, judged, main, run
from scripts.fuzz.shrink import shrink, smaller_cases
from scripts.fuzz.workers import Worker

ROOT = Path(__file__).parents[1]
DRAWS = 3000
# About a minute: the first cases of a seed, as they come. Cases 2 and 3 found faults once.
SEED, NUMBERS = 303, range(8)

Case = dict[str, Any]


@pytest.fixture(scope="module")
def drawn() -> list[Case]:
    return [draw_case(3, number) for number in range(DRAWS)]


# --- what is drawn ---


def test_a_case_follows_from_its_seed_and_number_alone() -> None:
    """In another process with other hashes, and after other cases, too."""
    text = json.dumps([draw_case(9, number) for number in range(40)])
    program = (
        "import json; from scripts.fuzz.draw import draw_case\nprint(json.dumps([draw_case(9, n) for n in range(40)]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "4242", "PYTHONPATH": str(ROOT)}
    other = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert other.stdout.strip() == text
    assert draw_case(9, 17) == json.loads(text)[17]
    assert draw_case(10, 17) != draw_case(9, 17)


def test_every_family_and_each_of_its_knobs_is_drawn(drawn: list[Case]) -> None:
    for name, family in FAMILIES.items():
        configs = [case["base"]["config"] for case in drawn if case["base"]["family"] == name]
        assert len(configs) >= 20, name
        for knob in family.knobs:
            values = {json.dumps(config.get(knob)) for config in configs}
            assert len(values) > 1, f"{name}: {knob} is always {values}"
        assert {config.get("tie_word_embeddings", family.tied) for config in configs} == {True, False}, name
    ropes = [case["base"]["config"].get("rope_parameters", {}).get("rope_type") for case in drawn]
    assert {"default", "linear", "llama3", "yarn"} <= set(ropes)


def _options(case: Case) -> Iterator[str]:
    words = case["build"]["arguments"]
    for place, word in enumerate(words):
        if word.startswith("--"):
            following = words[place + 1] if place + 1 < len(words) else ""
            yield word if following.startswith("--") or word in ("--mix", "--variants") else f"{word} {following}"


@pytest.mark.parametrize(
    ("what", "of", "wanted"),
    [
        ("purpose", lambda case: [case["purpose"]], PURPOSES),
        ("kind", lambda case: [e["kind"] for e in case["experts"]],
         ("lora", "rslora", "dora", "adalora", "saved", "rows")),
        ("experts", lambda case: [len(case["experts"])], (1, 2, 3, 4)),
        ("expert's field", lambda case: [key for e in case["experts"] for key in e["config"]],
         ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "modules_to_save",
          "trainable_token_indices", "ensure_weight_tying", "init_lora_weights", "fan_in_fan_out")),
        ("targets", lambda case: [t if t == "all-linear" else type(t).__name__ for e in case["experts"]
                                  for t in [e["config"]["target_modules"]]], ("all-linear", "str", "list")),
        ("ends", lambda case: [t for e in case["experts"] for t in e["config"]["target_modules"]],
         ("embed_tokens", "lm_head")),
        ("scale", lambda case: [e["scale"] for e in case["experts"]], (0.0, 0.05, 0.3)),
        ("pruned", lambda case: [e["pruned"] for e in case["experts"]], (True, False)),
        ("stored", lambda case: [case["base"]["dtype"], *(e["dtype"] for e in case["experts"])],
         ("float32", "bfloat16", "float16")),
        ("shards", lambda case: [case["base"]["shards"]], (1, 2, 3)),
        ("form", lambda case: [case["base"]["form"]], ("full", "minimal", "old_rope")),
        ("tie that is none", lambda case: [case["base"]["flag_lies"]], (None, "tied")),
        ("tokenizer", lambda case: [case["base"]["tokenizer"]], (None, "plain", "added", "config_only", "old_files")),
        ("generation", lambda case: list(case["base"]["generation"]), [key for field in GENERATION for key in field]),
        ("layout", lambda case: [case["gate"]["layout"]] if case["gate"] else [], ("peft", "damaged", "original")),
        ("depth", lambda case: [case["gate"]["config"]["xlora_depth"]] if case["gate"] else [], (1, 2, 3)),
        ("top k", lambda case: [case["gate"]["config"].get("top_k_lora")] if case["gate"] else [], (None, 1, 2, 3)),
        ("odd", lambda case: [case["odd"]], (None, *ODD)),
        ("late", lambda case: [len(case["late"])], (0, 1)),
        ("merge", lambda case: [case["build"]["merge"]], ("linear", "cat", "svd", "ties", "rank-select")),
        ("option", lambda case: _options(case),
         ("--emit modern", "--cache none", "--dtype float16", "--dtype bfloat16", "--verify quick",
          "--verify structure", "--verify full", "--scalings sites", "--site-op plugin",
          "--gate-op plugin", "--adapters-as inputs",
          "--no-onnxruntime-form", "--variants", "--mix")),
        ("decode", lambda case: [r["decode"].split(":")[0] for r in case["runs"]],
         ("exact", "paired", "auto", "lookup", "frozen", "folded")),
        ("rows", lambda case: [len(r["rows"]) for r in case["runs"]], (1, 2, 3, 5)),
        ("built twice", lambda case: [case["built_twice"]], (True, False)),
        ("via", lambda case: [case["via"]], ("cli", "python")),
    ],
)  # fmt: skip
def test_every_choice_is_drawn(what: str, of: Callable[[Case], Any], wanted: Any, drawn: list[Case]) -> None:
    seen = {value for case in drawn for value in of(case)}
    assert set(wanted) <= seen, f"{what}: never {set(wanted) - seen}"


def test_prompts_reach_from_one_token_to_the_contexts_end(drawn: list[Case]) -> None:
    lengths, ends = set(), 0
    for case in drawn:
        config = case["base"]["config"]
        positions = config.get("max_position_embeddings") or config["n_positions"]
        for request in case["runs"]:
            for row in request["rows"]:
                lengths.add(len(row["prompt"]))
                assert len(row["prompt"]) + request["new"] <= positions + 1
                ends += len(row["prompt"]) + request["new"] == positions + 1
    assert 1 in lengths
    assert ends > 100


def test_hash_seeds_change_with_the_process() -> None:
    assert hash_seed_of(3, 0) == hash_seed_of(3, CASES_A_HASH_SEED - 1) == draw_case(3, 5)["hash_seed"]
    assert len({hash_seed_of(3, CASES_A_HASH_SEED * block) for block in range(20)}) == 20


# --- cases hold ---


def _assert_nothing_found(lines: list[log.Line]) -> None:
    found = [
        f"case {line['number']}: {line['verdict']}: {line['detail']}" for line in lines if line["verdict"] in FINDINGS
    ]
    assert not found, "\n".join(found)


def test_a_minute_of_cases(tmp_path: Path) -> None:
    """Through the worker process, as a run does it; most of what is drawn must really be compared."""
    worker, lines = Worker(hash_seed_of(SEED, 0)), []
    try:
        for case in [draw_case(SEED, number) for number in NUMBERS]:
            outcome = judged(worker, case, tmp_path / str(case["number"]), 300)
            lines.append(log.line_of(case, outcome, worker.hash_seed))
    finally:
        worker.close()
    _assert_nothing_found(lines)
    equal = [line for line in lines if line["verdict"] == Verdict.EQUAL]
    assert len(equal) >= len(NUMBERS) - 2
    assert sum(line["counts"]["tokens"] for line in equal) > 200


@pytest.mark.long
def test_ten_minutes_of_cases(tmp_path: Path) -> None:
    assert main(["--seed", "77", "--minutes", "10", "--jobs", "2", "--out", str(tmp_path), "--hang", "300"]) == 0, (
        tmp_path / "summary.md"
    ).read_text()


# --- faults planted on purpose ---


def small_case(**parts: Any) -> Case:
    """Two experts on one Llama block, one an rsLoRA of rank 4, in a static build; its numbers are not checked."""

    def expert(name: str, kind: str, **config: Any) -> Case:
        settings = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8} | config
        return {
            "name": name,
            "kind": kind,
            "config": settings,
            "seed": 3,
            "scale": 0.3,
            "dtype": "float32",
            "pruned": False,
        }

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "vocab_size": 64, "max_position_embeddings": 40, "intermediate_size": 16, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    base = {
        "family": "llama", "config": sizes, "seed": 1, "dtype": "float32", "shards": 1, "flag_lies": None,
        "form": "full", "tokenizer": None, "generation": {},
    }  # fmt: skip
    build = {
        "arguments": ["--mode", "static", "--mix", "math=1.0", "--verify", "structure", "--no-onnxruntime-form"],
        "named": {"static": {"math": 1.0}}, "merge": "linear", "names_base": True,
    }  # fmt: skip
    rows = [{"prompt": [5, 9, 33, 7], "variant": "static"}, {"prompt": [3], "variant": "static"}]
    case = {
        "format": 1, "seed": 0, "number": 0, "purpose": "static", "base": base, "gate": None, "late": [], "texts": [],
        "experts": [expert("math", "rslora", use_rslora=True), expert("code", "lora")], "build": build, "hash_seed": 7,
        "runs": [{"rows": rows, "new": 3, "decode": "exact", "batch": 8}], "built_twice": False,
        "via": "cli", "odd": None,
    }  # fmt: skip
    return copy.deepcopy(case) | parts


def small_gated_case() -> Case:
    """For plants that end a build before anything dear: knobs that shrinking must take away."""
    return next(case for case in (draw_case(1, number) for number in range(3000)) if _is_rich(case))


def _is_rich(case: Case) -> bool:
    layers = case["base"]["config"].get("num_hidden_layers")
    return case["base"]["family"] == "llama" and bool(case["gate"]) and len(case["experts"]) == 2 and layers == 2


def shrunk(case: Case, outcome: Mapping[str, Any], folder: Path, tries: int = 400) -> Case:
    """The case as small as it gets with the same finding."""

    def shows(smaller: Case) -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        found = judge(smaller, folder)
        return found["verdict"] in FINDINGS and signature(found) == signature(outcome)

    return shrink(case, shows, 300, tries)[0]


def ended_in(action: Callable[[], None]) -> Callable[..., Any]:
    """In place of `read_inputs`."""

    def planted(*_: Any) -> None:
        action()

    return planted


def _crash() -> None:
    raise ZeroDivisionError("planted")


def _strange_refusal() -> None:
    raise ExportError("this is refused for no reason", where="planted", got="1")


def _leave_file() -> None:
    with tempfile.NamedTemporaryFile(prefix="planted-", delete=False):
        pass
    raise ExportError("the modern emit always has a K/V cache")


@pytest.mark.parametrize(
    ("action", "verdict", "message", "tries"),
    [
        (_crash, Verdict.CRASHED, "ZeroDivisionError: planted", 400),  # to the end
        (_strange_refusal, Verdict.UNKNOWN_REFUSAL, "refused for no reason", 8),
        (_leave_file, Verdict.LEFT_FILES, "tmp/planted-", 8),
    ],
)
def test_a_planted_end_is_found_and_shrunk(
    action: Callable[[], None],
    verdict: Verdict,
    message: str,
    tries: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exporter.build_bundle.read_inputs", ended_in(action))
    if tries > 100:  # this plant reads no files, so none need be written each time
        monkeypatch.setattr("scripts.fuzz.judge.write_checkpoint", lambda case, folder: None)
    case = small_gated_case()
    outcome = judge(case, tmp_path / "case")
    assert outcome["verdict"] == verdict, outcome["detail"]
    assert message in outcome["detail"]
    small = shrunk(case, outcome, tmp_path / "small", tries)
    assert len(small["experts"]) == 1
    assert [len(request["rows"]) for request in small["runs"]] == [1]
    if tries > 100:
        assert small["base"]["config"]["num_hidden_layers"] == 1
        assert [len(row["prompt"]) for request in small["runs"] for row in request["rows"]] == [1]
        assert small["base"]["config"].keys() < case["base"]["config"].keys()
    script = write_repro(tmp_path / "finding.py", small, outcome, 1, limit=60)
    compile(script.read_text(), "finding.py", "exec")


def halve(self: LoraFields, path: str) -> float:
    """A scale that graph and reference both get from the checkpoint, half of what PEFT has."""
    return WHOLE(self, path) / 2


WHOLE = LoraFields.scale_of


def test_a_scale_wrong_in_graph_and_reference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraFields, "scale_of", halve)
    case = small_case()
    case["build"]["arguments"][5] = "quick"  # which passes: both read the same number
    outcome = judge(case, tmp_path / "case")
    assert outcome["verdict"] == Verdict.DIFFERS, outcome["detail"]
    assert "logits differ by" in outcome["detail"]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "case")
    assert judge(case, tmp_path / "case")["verdict"] == Verdict.EQUAL


def test_a_repro_shows_the_fault_alone_and_ends_well_without_it(tmp_path: Path) -> None:
    """The script needs nothing of this package; the fault stands in a copy of the project."""
    copied = tmp_path / "project"
    for name in ("exporter", "runtime", "plugins"):
        shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__", "*.xz"))
    path = copied / "runtime" / "adapter_folder" / "lora_config.py"
    text = path.read_text()
    assert "math.sqrt(rank) if self.use_rslora" in text
    path.write_text(text.replace("math.sqrt(rank) if self.use_rslora", "rank if self.use_rslora"))
    outcome = {"verdict": Verdict.DIFFERS, "detail": "planted"}
    script = write_repro(tmp_path / "finding.py", small_case(), outcome, 1, limit=300)
    assert "scripts.fuzz." not in script.read_text().replace("scripts/fuzz", "")
    wrong = _run_repro(script, copied)
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    assert "logits differ by" in wrong.stdout


@pytest.mark.long
def test_a_repro_ends_well_where_there_is_no_fault(tmp_path: Path) -> None:
    script = write_repro(
        tmp_path / "finding.py", small_case(), {"verdict": Verdict.DIFFERS, "detail": ""}, 1, limit=300
    )
    right = _run_repro(script, ROOT)
    assert (right.returncode, right.stdout.splitlines()[-1]) == (0, "equal"), right.stdout + right.stderr


def _run_repro(script: Path, project: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(project)}
    return subprocess.run([sys.executable, str(script)], cwd=project, env=environment, capture_output=True, text=True)


SEED_OF_FAKES = 12
# A worker that answers at once, and hangs, dies or builds other bytes where a case says so.
FAKE_WORKER = """
import json, os, sys, time
replies = os.fdopen(int(sys.argv[1]), "w", buffering=1)
print(json.dumps({"ready": True}), file=replies, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    case = asked["case"]
    kinds = [expert["kind"] for expert in case["experts"]]
    if "PLANT" == "hang" and "dora" in kinds:
        time.sleep(1000)
    if "PLANT" == "die" and "dora" in kinds:
        os._exit(7)
    digests = {"graph": os.environ["PYTHONHASHSEED"] if "PLANT" == "hashes" else "same"} if case["built_twice"] else {}
    reply = {"verdict": "equal", "detail": "", "seconds": {}} | ({"digests": digests} if digests else {})
    print(json.dumps(reply), file=replies, flush=True)
"""


def _with_fake_worker(folder: Path, plant: str, cases: int) -> list[log.Line]:
    worker = folder / "worker.py"
    worker.write_text(FAKE_WORKER.replace("PLANT", plant))
    command, seconds = (sys.executable, str(worker)), 0.5 if plant == "hang" else 60
    return run(
        Settings(
            SEED_OF_FAKES, folder / "out", cases=cases, jobs=2, hang_seconds=seconds, shrink_seconds=3, command=command
        )
    )


@pytest.mark.parametrize(("plant", "verdict"), [("hang", Verdict.HUNG), ("die", Verdict.DIED)])
def test_a_worker_that_hangs_or_dies_is_replaced_and_its_case_shrunk(
    plant: str, verdict: Verdict, tmp_path: Path
) -> None:
    lines = _with_fake_worker(tmp_path, plant, 12)
    numbers = {line["number"] for line in lines if line["verdict"] == verdict}
    assert numbers == {n for n in range(12) if "dora" in [e["kind"] for e in draw_case(SEED_OF_FAKES, n)["experts"]]}
    [first] = [line for line in lines if line["repro"]]
    assert all(line["twin_of"] == first["number"] for line in lines if line["number"] in numbers - {first["number"]})
    small = json.loads(Path(first["repro"]).with_suffix(".json").read_text())["small"]
    assert len(small["experts"]) <= len(draw_case(SEED_OF_FAKES, first["number"])["experts"])
    assert "dora" in [expert["kind"] for expert in small["experts"]]
    compile(Path(first["repro"]).read_text(), "finding.py", "exec")


def test_bundles_that_follow_the_hash_seed_are_found(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    lines = _with_fake_worker(tmp_path / "bad", "hashes", 70)
    twice = {number for number in range(70) if draw_case(SEED_OF_FAKES, number)["built_twice"]}
    assert {line["number"] for line in lines if line["verdict"] == Verdict.UNSTABLE} == twice
    assert len([line for line in lines if line["repro"]]) == 1
    once = [line for line in lines if line["verdict"] != Verdict.UNSTABLE]
    assert all(line["hash_seed"] == hash_seed_of(SEED_OF_FAKES, line["number"]) for line in once)
    (tmp_path / "good").mkdir()
    assert not [line for line in _with_fake_worker(tmp_path / "good", "none", 70) if line["verdict"] in FINDINGS]


def test_shrinking_takes_away_all_that_does_not_matter() -> None:
    """Of a rich case only what the finding needs is left, and every smaller case is still a case."""
    case = small_gated_case()
    case["gate"] |= {"layout": "original", "as_list": True, "use_bias": True, "relu": False}
    name = case["experts"][1]["name"]

    def shows(smaller: Case) -> bool:
        assert smaller != case
        json.dumps(smaller)
        return smaller["gate"]["config"]["enable_softmax"] == case["gate"]["config"]["enable_softmax"] and any(
            expert["name"] == name for expert in smaller["experts"]
        )

    small, tries = shrink(case, shows, 60, 5000)
    assert tries > 10
    assert [expert["name"] for expert in small["experts"]] == [name]
    assert [len(request["rows"]) for request in small["runs"]] == [1]
    assert "--emit" not in small["build"]["arguments"]
    assert small["gate"]["layout"] == "peft"
    assert not any(shows(smaller) for smaller in smaller_cases(small))


# --- the log ---


def test_known_refusals_say_why() -> None:
    assert all(known.reason and known.pattern for known in refusals.KNOWN)
    assert refusals.known_reason("--cache none: the modern emit always has a K/V cache. Fix: …")
    assert refusals.known_reason("something else") is None


def test_the_summary_counts_what_the_log_holds(tmp_path: Path) -> None:
    cases = [draw_case(3, number) for number in range(6)]
    found = {
        "verdict": Verdict.CRASHED,
        "detail": "exit 4: KeyError: 'x'",
        "seconds": {},
        "repro": "out/finding-3-5.py",
    }
    fine = {"verdict": Verdict.EQUAL, "detail": "", "seconds": {"build": 1.0}, "counts": {"tokens": 10, "worst": 2e-7}}
    lines = [log.line_of(case, fine, 1) for case in cases[:5]] + [log.line_of(cases[5], found, 2)]
    for line in lines:
        log.append(tmp_path / "log.jsonl", line)
    assert log.read(tmp_path / "log.jsonl") == json.loads(json.dumps(lines))
    text = log.summary(log.read(tmp_path / "log.jsonl"), 0.5, 2)
    assert "6 checkpoints in 0.5 minutes on 2 processes (12.0 a minute), seed 3;" in text
    assert "50 tokens and ids compared, 2 hash seeds" in text
    assert "| equal | 5 |" in text
    assert f"| crashed | 3, 5 | {cases[5]['base']['family']} | exit 4: KeyError: 'x' | finding-3-5.py |" in text
