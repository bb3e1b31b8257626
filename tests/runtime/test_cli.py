"""`python -m runtime` as a user meets it: output, exit codes, messages, imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import cli, complete, load
from runtime.prompts import GenerateOptions
from tests.runtime.tiny_bundles import tiny_bundle
from tests.runtime.tiny_graphs import TinyShape

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", end=())


def run(*argv: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run in this process: exit code, stdout, stderr."""
    code = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_prints_one_object_a_prompt(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.txt"
    file.write_text("from a file →\n")
    words = ["--prompt", "日本", "--prompt-ids", "5,17,3", "--prompt-file", file, "--max-new-tokens", 5, "--json"]
    code, out, err = run("generate", bundle, *words, capsys=capsys)
    with load(bundle) as model:
        want = complete(model, ["日本", [5, 17, 3], "from a file →"], GenerateOptions(max_new_tokens=5))
    assert code == 0
    got = [json.loads(line) for line in out.splitlines()]
    assert [line["token_ids"] for line in got] == [list(completion.token_ids) for completion in want]
    assert [line["text"] for line in got] == [completion.text for completion in want]
    assert [line["finish_reason"] for line in got] == ["length"] * 3
    assert got[1]["timings"]["prompt_tokens"] == 3
    assert set(got[0]) == {"token_ids", "text", "finish_reason", "timings", "variant", "divergence", "folded"}
    assert (
        err == "graph dynamic (dynamic, portable) on cpu; "
        "verified, level full (numbers of this model), stage A; stage B: not needed (fp32)\n"
    )


def test_a_kv_budget_changes_no_answer(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", bundle, "-q", "--max-new-tokens", 6]
    words += [word for n in range(5) for word in ("--prompt-ids", f"{n + 1},2")]
    plain = run(*words, capsys=capsys)
    with load(bundle) as model:
        slot = model.session.cache_bytes(1, 64)
    assert run(*words, "--kv-budget", 4 * slot, "--decode", "exact", capsys=capsys) == plain
    assert run(*words, "--kv-budget", 4 * slot, "--stream", capsys=capsys) == plain
    code, out, err = run(*words, "--kv-budget", slot, capsys=capsys)
    assert (code, out) == (2, "")
    assert "prompt 5: the request does not fit the K/V budget; got 7 tokens in 2 slots" in err
    assert run(*words, "--kv-budget", slot, "--decode", "frozen", capsys=capsys)[0] == 2


def test_streaming_prints_the_same_text(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", bundle, "--prompt", "hello", "--prompt", "日", "--max-new-tokens", 30, "-q"]
    plain = run(*words, capsys=capsys)
    assert plain == run(*words, "--stream", capsys=capsys)
    assert plain[0] == 0
    assert plain[2] == ""  # -q
    assert len(plain[1]) > 30


def test_the_status_line_says_what_is_not_verified(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run("generate", bundle, "--prompt", "a", "--max-new-tokens", 1, "--graph", "plain", capsys=capsys)
    assert err == "graph plain (static, portable) on cpu; NOT VERIFIED (no report)\n"


def test_sampling_flags_reach_the_sampler(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", bundle, "--prompt", "hello", "--max-new-tokens", 10, "-q", "--json"]

    def ids(*more: object) -> list[int]:
        found = json.loads(run(*words, *more, capsys=capsys)[1])["token_ids"]
        assert len(found) == 10
        return list(found)

    greedy, warm = ids(), ids("--temperature", 2, "--seed", 1)
    assert warm == ids("--temperature", 2, "--seed", 1)
    assert len({tuple(greedy), tuple(warm), tuple(ids("--temperature", 2, "--seed", 2))}) == 3
    assert greedy == ids("--temperature", 2, "--seed", 1, "--top-k", 1)
    assert greedy == ids("--temperature", 2, "--seed", 1, "--top-p", 1e-9)
    assert greedy != ids("--mix", "math=1")
    assert ids("--mix", "base") == ids("--mix", "math=0") != ids("--mix", "code=1")


def test_the_way_of_decoding_is_chosen_and_its_success_told(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", bundle, "--prompt", "hello", "--prompt", "日", "--max-new-tokens", 20]

    def told(*more: object) -> tuple[str, list[str]]:
        code, out, err = run(*words, *more, capsys=capsys)
        assert code == 0
        return out, err.splitlines()[1:]

    exact, nothing = told("--decode", "exact")
    assert nothing == []
    ways = [["--decode", way] for way in ("paired", "auto", "paired:3", "lookup:4")]
    for more in ([], *ways, ["--decode", "paired", "--stream"]):
        out, [line] = told(*more)
        assert out == exact
        assert re.fullmatch(r"drafts: \d+ of \d+ came true \(\d+%\); \d+% of the steps of exact", line)
    assert "of 36 came" in told("--decode", "paired")[1][0]
    number = r"\d[\d.e-]*"
    pattern = rf"frozen scalings \(approximate\): KL to exact {number} nats a token, the same top token {number}%; of "
    for more in ([], ["--freeze", "mean"], ["--stream"]):
        out, [line] = told("--decode", "frozen:2", *more)
        assert out != exact
        assert re.fullmatch(pattern + "34 tokens", line)
    out, lines = told("--decode", "frozen:50")
    assert (out, lines) == (exact, ["frozen scalings (approximate): no token was chosen under them"])
    assert told("--decode", "frozen", "--mix", "base")[1] == []


def test_json_tells_of_drafts_and_of_the_distance(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", bundle, "--prompt", "hello", "--max-new-tokens", 20, "--json", "-q"]
    paired = json.loads(run(*words, "--decode", "paired", capsys=capsys)[1])
    assert paired["timings"]["drafts"] == 18
    assert 0 < paired["timings"]["accepted"] < 18
    assert paired["divergence"] is None
    frozen = json.loads(run(*words, "--decode", "frozen", "--freeze", "mean", capsys=capsys)[1])
    assert frozen["timings"]["drafts"] == 0
    assert set(frozen["divergence"]) == {"tokens", "kl_mean", "same_top"}
    assert frozen["divergence"]["tokens"] == 19
    assert frozen["divergence"]["kl_mean"] > 0


def test_inspect_prints_text_or_the_manifest(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("inspect", bundle, capsys=capsys)
    assert code == 0
    assert "dynamic" in out
    assert json.loads(run("inspect", bundle, "--json", capsys=capsys)[1])["base"]["name"] == "tiny"


def test_ids_are_printed_where_there_is_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_bundle(tmp_path / "b", tokenizer=False)
    code, out, _ = run("generate", path, "--prompt-ids", "5", "--max-new-tokens", 3, capsys=capsys)
    assert code == 0
    assert len([int(word) for word in out.split()]) == 3
    streamed = run("generate", path, "--prompt-ids", "5", "--max-new-tokens", 3, "--stream", capsys=capsys)[1]
    assert streamed.split() == out.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "5"], "error: no prompt. Fix: give --prompt TEXT"),
        (["--prompt", ""], "error: prompt 1: the prompt is empty; need at least one token"),
        (["--prompt-ids", "1,300"], "error: prompt 1: unknown token ids; got [300]; need 0..299"),
        (["--prompt-file", "/no/such"], "error: /no/such: cannot read the prompt; got No such file or directory"),
        (["--prompt", "a", "--mix", "poetry=1"], "error: no expert 'poetry'; need one of: math, code, lyrics"),
        (["--prompt", "a", "--mix", "math"], "error: cannot read 'math'; need NAME=WEIGHT"),
        (["--prompt", "a", "--graph", "nope"], "no graph 'nope'; need one of: plain (static), dynamic (dynamic)"),
        (["--prompt", "a", "--top-p", "0.5"], "mean nothing at temperature; got 0; need a temperature above 0"),
        (["--prompt", "a", "--temperature", "-1"], "error: temperature; got -1.0; need a finite number >= 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "error: max_new_tokens; got 0; need at least 1"),
        (["--prompt", "a", "--max-new-tokens", "9999"], "too long for the model's positions; got 1 prompt tokens and"),
        (["--prompt", "a", "--stop", ""], "error: a stop string is empty"),
        (
            ["--prompt", "a", "--decode", "fast"],
            "error: no such way to decode; got 'fast'; need exact, paired[:K],",
        ),
        (
            ["--prompt", "a", "--freeze", "mean"],
            "error: only frozen scalings are frozen; got 'freeze mean with decode au",
        ),
        (["--prompt", "a", "--threads", "0"], "error: threads; got 0; need at least 1"),
        (["--prompt", "bad \udcff bytes"], "error: prompt 1: tokenizer.json: the tokenizer cannot encode the prompt"),
    ],
)
def test_bad_input_is_a_line_and_exit_2(
    bundle: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("generate", bundle, "-q", *words, capsys=capsys)
    assert message in err
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_all_prompt_files_that_cannot_be_read_are_told(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("generate", bundle, "-q", "--prompt-file", "/no/a", "--prompt-file", "/no/b", capsys=capsys)
    assert (code, err.count("cannot read the prompt"), err.startswith("error: prompts: 2 problems")) == (2, 2, True)


def test_a_missing_bundle_is_a_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect"], ["generate", "--prompt", "a"]):
        code, _, err = run(command[0], tmp_path / "nope", *command[1:], capsys=capsys)
        assert code == 2
        assert err.startswith("error: ")
        assert "Traceback" not in err


def test_several_experts_without_gate_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_bundle(tmp_path / "b", TinyShape(vocab=300, hidden=16, experts=2, gate=False))
    code, _, err = run("generate", path, "-q", "--prompt", "a", capsys=capsys)
    assert code == 2
    assert "weights for some of: math, code. Fix: --mix math=0.5,code=0.5" in err


def test_a_missing_gpu_is_exit_3(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine's onnxruntime has CUDA")
    code, out, err = run("generate", bundle, "--prompt", "a", "--provider", "cuda", capsys=capsys)
    assert (code, out) == (3, "")
    assert "has no CUDAExecutionProvider" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["--prompt-ids", "1,x"], ["--frobnicate"], ["--stream", "--json"]])
def test_bad_flags_are_exit_2(bundle: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("generate", bundle, "--prompt", "a", *words, capsys=capsys)
    assert caught.value.code == 2


def test_a_defect_keeps_its_traceback_and_is_exit_4(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "inspect", lambda args: 1 / 0)
    code, _, err = run("inspect", bundle, capsys=capsys)
    assert code == 4
    assert "ZeroDivisionError" in err


def python(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, **options
    )  # type: ignore[call-overload, no-any-return]


def test_a_real_generate_loads_no_heavy_module(bundle: Path) -> None:
    script = (
        "import sys; from runtime.cli import main; "
        f"code = main(['generate', {str(bundle)!r}, '--prompt', 'hi', '--max-new-tokens', '3', '--json', '-q']); "
        "heavy = {'torch', 'transformers', 'peft', 'onnx', 'onnx_ir', 'onnxscript', 'exporter', 'triton', 'cuda'}; "
        "print(code, sorted(heavy & {name.partition('.')[0] for name in sys.modules}), 'onnxruntime' in sys.modules)"
    )
    done = python("-c", script)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0 [] True"


def test_import_and_help_load_nothing_but_the_standard_library() -> None:
    script = (
        "import sys, runtime; from runtime.cli import parser; parser().format_help(); "
        "print(sorted({'numpy', 'pydantic', 'tokenizers', 'onnxruntime'} & set(sys.modules)))"
    )
    assert python("-c", script).stdout == "[]\n"
    done = python("-m", "runtime", "generate", "--help")
    assert done.returncode == 0
    assert "--prompt-ids" in done.stdout


def test_public_names_resolve() -> None:
    import runtime

    for name in dir(runtime):
        assert getattr(runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = runtime.torch


def test_ctrl_c_is_clean(tmp_path: Path) -> None:
    shape = TinyShape(vocab=300, hidden=16, experts=3, max_positions=60000)
    path = tiny_bundle(tmp_path / "b", shape, end=())
    words = ["-m", "runtime", "generate", str(path), "--prompt", "a", "--max-new-tokens", "50000", "--stream", "-q"]
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell's children ignore it
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.read(5)  # it streams
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "interrupted\n"


def test_a_closed_pipe_is_no_error(bundle: Path) -> None:
    words = ["-m", "runtime", "generate", str(bundle), "--prompt", "a", "--stream", "-q"]
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write)
        os.close(read)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


def test_a_checkpoint_is_told_from_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "is a checkpoint, no bundle. Fix: make a bundle of it with `python -m exporter build`" in (
        capsys.readouterr().err
    )


def test_a_mix_of_percentages_is_remarked_on(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = json.loads((bundle / "manifest.json").read_text())["experts"][0]["name"]
    assert cli.main(["generate", str(bundle), "--prompt", "a", "--max-new-tokens", "1", "--mix", f"{name}=70"]) == 0
    assert f"note: weights are factors, 0.7 is 70 %: the mix has {name}=70" in capsys.readouterr().err


SEVERAL = {
    "more prompts than a batch": ["--batch-size", 2],
    "a K/V budget": ["--kv-budget", 1 << 30],
    "both": ["--batch-size", 2, "--kv-budget", 1 << 30],
    "one after the other": ["--batch-size", 1],
    "streamed": ["--stream"],
    "a batch": [],
}


@pytest.mark.parametrize("decode", ["exact", "paired", "auto", "paired:2", "lookup", "frozen:2"])
@pytest.mark.parametrize("name", SEVERAL)
def test_any_way_to_run_several_prompts_ends_well_and_tells_true_steps(
    bundle: Path, name: str, decode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--kv-budget" in SEVERAL[name] and decode not in ("exact", "paired", "auto"):
        pytest.skip("knows no K/V budget")
    prompts = [word for ids in ("5,17", "6,1,9,3", "7") for word in ("--prompt-ids", ids)]
    words = ["generate", bundle, *prompts, "--max-new-tokens", 6, "--decode", decode, *SEVERAL[name]]
    code, out, err = run(*words, capsys=capsys)
    assert (code, "Traceback" in err) == (0, False)
    for share in re.findall(r"(\d+)% of the steps of exact", err):
        assert 0 < int(share) <= 200
    if name == "streamed":
        return
    code, out, _ = run(*words, "--json", capsys=capsys)
    timings = [json.loads(line)["timings"] for line in out.splitlines()]
    assert code == 0
    assert all(each["exact_steps"] >= 12 and each["steps"] > 0 for each in timings)


def test_steps_under_a_fixed_mix_are_counted_too(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [word for ids in ("5,17", "6,1,9,3", "7") for word in ("--prompt-ids", ids)]
    words = ["generate", bundle, *prompts, "--max-new-tokens", 6, "--mix", "math=1", "--json", "--batch-size", 2]
    code, out, _ = run(*words, capsys=capsys)
    timings = [json.loads(line)["timings"] for line in out.splitlines()]
    assert code == 0
    assert all(each["steps"] == each["exact_steps"] >= 6 for each in timings)
