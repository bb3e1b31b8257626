"""`analyze` as a command: a whole report or none, commands that work, and one clear error for each bad input."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from itertools import combinations
from pathlib import Path

import onnxruntime
import pytest

from exporter.analysis import publish_report as publishing
from exporter.analysis.analyze import AnalyzeSpec, analyze, context_of, made_now, require_analysable
from exporter.analysis.page import number, page, share, size
from exporter.analysis.plots import mix_plot
from exporter.analysis.publish_report import check_target, publish_report
from exporter.analysis.report import Choice, CompressionStudy, ExpertStudy, GateRow, Report
from exporter.analysis.static_mix import recommendation
from exporter.cli import main
from exporter.errors import ExportError
from runtime.bundle import open_bundle
from runtime.cli import main as run_runtime
from runtime.errors import InputError, MachineError
from runtime.mix_file import MixFile, read_mix
from tests.exporter.analysed import Analysed
from tests.runtime.tiny_bundles import tiny_bundle

NO_COMPRESSION = CompressionStudy(absent="why")
FILES = ["mix.json", "report.html", "report.json"]


def words(analysed: Analysed, out: Path, *more: str) -> list[str]:
    return [
        "analyze", str(analysed.built.bundle.root), "--data", str(analysed.data), "--out", str(out),
        "--threads", "1", "--no-compression", *more,
    ]  # fmt: skip


# --- what it writes ---


def test_the_command_writes_page_numbers_and_mix(
    analysed: Analysed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert main(words(analysed, out, "--context", "20")) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert printed[-1] == str(out)
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.mixes.scores == analysed.report.mixes.scores
    assert report.gate == analysed.report.gate
    assert report.costs.context == 20
    assert read_mix(out / "mix.json") == analysed.mix
    for score in report.mixes.scores:
        assert any(line.startswith(score.name) and f"{score.perplexity:.4g}" in line for line in printed)
    assert f"recommended: {report.mixes.recommendation.choice}. {report.mixes.recommendation.reason}" in printed
    assert str(out / "mix.json") in report.mixes.recommendation.commands[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"], "nothing beside it"


@pytest.mark.parametrize("choice", list(Choice))
def test_the_recommended_commands_work(
    analysed: Analysed, tmp_path: Path, choice: Choice, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, with the prompt and the paths that only a person knows filled in."""
    out = tmp_path / "my report"
    publish_report(out, analysed.report, "", analysed.mix)
    (tmp_path / "my bundle").symlink_to(analysed.built.bundle.root)
    bundle = str(tmp_path / "my bundle")
    found = recommendation(choice, "mean mix by site", "", bundle, str(out / "mix.json"), is_gated=True)
    own = {"...": "the of", "ADAPTERS": str(analysed.built.checkpoint.xlora), "STATIC_BUNDLE": str(tmp_path / "static")}
    tools = {"runtime": run_runtime, "exporter": main}
    for command in found.commands:
        _, _, tool, *rest = (own.get(word, word) for word in shlex.split(command))
        more = ["--verify", "structure"] if rest[0] == "build" else ["--max-new-tokens", "3", "--json"]
        assert tools[tool]([*rest, *more]) == 0, command
        printed = capsys.readouterr().out
        assert rest[0] == "build" or len(json.loads(printed)["token_ids"]) == 3
    if choice is Choice.STATIC:
        [graph] = open_bundle(tmp_path / "static").manifest.graphs
        assert graph.mix_sites == analysed.mix.sites
        command = words(analysed, tmp_path / "other")
        command[1] = str(tmp_path / "static")
        message = refused(command, capsys)
        assert "has no dynamic graph to analyse; got static (static). Fix: build with --mode dynamic" in message


# --- the page ---


def test_the_page_needs_nothing_else_and_has_every_section(analysed: Analysed) -> None:
    html = page(analysed.report)
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in sources)
    assert [alt.removeprefix("plot: ") for alt in re.findall(r'alt="([^"]*)"', html)] == [
        "gate", "mixes", "pairs", "norms", "compression", "errors", "costs",
    ]  # fmt: skip
    assert re.findall(r'<section id="(\w+)"', html) == ["summary", "gate", "mixes", "experts", "compression", "costs"]
    for target in re.findall(r'href="#(\w+)"', html):
        assert f'id="{target}"' in html
    assert html.count('class="how"') == 7, "a sentence on how to read each plot"
    for score in analysed.report.mixes.scores:
        assert f"<td>{score.name}</td><td>{number(score.perplexity)}</td>" in html
    assert mix_plot(analysed.report.mixes) == mix_plot(analysed.report.mixes), "the same bytes for the same numbers"


def test_a_page_says_what_was_not_measured(analysed: Analysed) -> None:
    mixes = analysed.report.mixes
    recommended = mixes.recommendation.model_copy(update={"thresholds": None})
    bare = analysed.report.model_copy(
        update={
            "gate": None,
            "mixes": mixes.model_copy(update={"recommendation": recommended}),
            "conflicts": ExpertStudy(absent="they are inputs <b>"),
            "compression": analysed.report.compression.model_copy(update={"absent": "why", "schemes": ()}),
        }
    )
    html = page(bare)
    assert "This bundle has no gate" in html
    assert "Not measured: they are inputs &lt;b&gt;." in html
    assert "Not measured: why." in html
    assert "Thresholds for a static mix" not in html


def test_the_page_of_a_routed_bundle_says_why_nothing_is_counted(analysed: Analysed) -> None:
    mixes = analysed.report.mixes.model_copy(update={"reference": "arrow router"})
    html = page(analysed.report.model_copy(update={"gate": None, "mixes": mixes, "compression": NO_COMPRESSION}))
    assert "This bundle has no gate but the arrow router, which decides inside each module" in html
    assert "never depend on the token" not in html
    assert "The mean mixes are" not in html
    assert "times the arrow router's." in html


@pytest.mark.filterwarnings("error")
def test_many_experts_fit(analysed: Analysed) -> None:
    """Plots that leave no room warn that they are not laid out; tables with columns by expert scroll."""
    report, names = analysed.report, [f"expert-number-{number}" for number in range(20)]
    assert report.gate is not None

    def crowded(row: GateRow) -> GateRow:
        return row.model_copy(update={field: dict.fromkeys(names, 0.05) for field in ("mass", "deviation", "top1")})

    groups = {field: tuple(map(crowded, getattr(report.gate, field))) for field in ("blocks", "sites")}
    gate = report.gate.model_copy(update={"model": crowded(report.gate.model), **groups})
    pair = report.conflicts.pairs[0]
    pairs = [
        pair.model_copy(update={"first": one, "second": other, "sign_conflict": None})
        for one, other in combinations(names, 2)
    ]
    norms = [report.conflicts.norms[0].model_copy(update={"expert": name}) for name in names]
    conflicts = ExpertStudy(pairs=tuple(pairs), norms=tuple(norms))
    update = {"experts": tuple(names), "gate": gate, "conflicts": conflicts, "compression": NO_COMPRESSION}
    html = page(report.model_copy(update=update))
    assert html.count('<div class="scroll"><table') == 2


def test_numbers_are_shown_with_three_digits() -> None:
    assert [number(value) for value in (0.00123, 12.345, 6804.1, None)] == ["0.00123", "12.3", "6,804", "–"]
    assert [size(value) for value in (12.0, 2497024.0, 3e9, 999_700.0)] == ["12 ", "2.5 M", "3 G", "1 M"]
    assert share(0.5192) == "51.9 %"


# --- whole or not at all ---


def test_a_report_is_replaced_only_when_asked(analysed: Analysed, tmp_path: Path) -> None:
    out = tmp_path / "report"
    publish_report(out, analysed.report, "first", analysed.mix)
    with pytest.raises(ExportError, match=r"this report exists already.*--overwrite"):
        publish_report(out, analysed.report, "second", analysed.mix)
    assert (out / "report.html").read_text() == "first"
    publish_report(out, analysed.report, "second", analysed.mix, overwrite=True)
    assert (out / "report.html").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match=r"not \(only\) a report, so it is never overwritten"):
        publish_report(out, analysed.report, "third", analysed.mix, overwrite=True)
    assert (out / "mine.txt").read_text() == "keep"


def test_where_the_system_cannot_swap_the_old_one_steps_aside(
    analysed: Analysed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report"
    publish_report(out, analysed.report, "first", analysed.mix)
    monkeypatch.setattr("exporter.staged_folder.swap", lambda *_: False)
    publish_report(out, analysed.report, "second", analysed.mix, overwrite=True)
    assert (out / "report.html").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("broken", ["report.html", "report.json", "mix.json"])
def test_a_disk_that_fails_leaves_the_old_report(
    analysed: Analysed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    out = tmp_path / "report"
    publish_report(out, analysed.report, "first", analysed.mix)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    real = {name: getattr(publishing, name) for name in ("_write", "write_mix")}

    def write(path: Path, *rest: object) -> None:
        if path.name == broken:
            raise OSError(28, "No space left on device", str(path))
        real["_write"](path, *rest)

    def write_mix(mix: MixFile, path: Path) -> None:
        write(path) if path.name == broken else real["write_mix"](mix, path)

    monkeypatch.setattr(publishing, "_write", write)
    monkeypatch.setattr(publishing, "write_mix", write_mix)
    with pytest.raises(MachineError, match="No space left on device; nothing was published"):
        publish_report(out, analysed.report, "second", analysed.mix, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_an_interrupted_analysis_writes_nothing(
    analysed: Analysed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("exporter.analysis.analyze.cost_table", interrupted)
    assert main(words(analysed, tmp_path / "report")) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- what is refused ---


def refused(command: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one error of a command that ends with 2."""
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "cannot be opened"),
        ([""], "line 1: is no training text"),
        (['{"text": "the"}'], "line 1: is no training text; got has 1 tokens, of which 1 are given"),
        (['{"text": "the of"}', "nonsense"], "line 2: is no training text; got is not JSON"),
        ([json.dumps({"text": "the " * 300})], "line 1: is no training text; got has 300 tokens"),
        (['{"prompt": "the"}'], 'has prompt; need {"prompt": "...", "completion": "..."} or {"text": "..."}'),
    ],
)
def test_bad_data(
    analysed: Analysed, tmp_path: Path, lines: list[str] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    if lines is not None:
        data.write_text("\n".join(lines) + "\n")
    command = words(analysed, tmp_path / "report")
    command[3] = str(data)
    assert message in refused(command, capsys)
    assert not (tmp_path / "report").exists()


def test_what_is_no_bundle(analysed: Analysed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = words(analysed, tmp_path / "report")
    command[1] = str(analysed.built.checkpoint.base)
    assert "is a checkpoint, no bundle" in refused(command, capsys)
    command[1] = str(tmp_path / "absent")
    assert "no such folder" in refused(command, capsys)


def test_a_bundle_without_a_tokenizer(analysed: Analysed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = words(analysed, tmp_path / "report")
    command[1] = str(tiny_bundle(tmp_path / "mute", tokenizer=False))
    assert "the bundle has no tokenizer, so it cannot read texts" in refused(command, capsys)


def test_targets_that_cannot_be(analysed: Analysed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before any work."""
    file = tmp_path / "file"
    file.write_text("")
    assert "is never overwritten" in refused(words(analysed, file, "--overwrite"), capsys)
    assert "--out: no such folder" in refused(words(analysed, tmp_path / "no" / "report"), capsys)
    (tmp_path / "link").symlink_to(tmp_path)
    assert "is never overwritten" in refused(words(analysed, tmp_path / "link", "--overwrite"), capsys)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=True)
    with pytest.raises(ExportError, match="exists already"):
        check_target(tmp_path / "empty", overwrite=False)


def test_a_report_inside_the_bundle(analysed: Analysed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be a file that the bundle does not list."""
    (tmp_path / "link").symlink_to(analysed.built.bundle.root)
    for root in (analysed.built.bundle.root, tmp_path / "link"):
        assert "--out: lies inside the bundle" in refused(words(analysed, root / "report"), capsys)
    open_bundle(analysed.built.bundle.root)


def test_a_bundle_that_the_cpu_does_not_run(analysed: Analysed) -> None:
    manifest = analysed.built.bundle.manifest
    brain = manifest.model_copy(update={"base": manifest.base.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(ExportError, match=r"here: cannot be analysed: .*CPU does not run it; got --dtype bfloat16"):
        require_analysable(brain, "here")
    require_analysable(manifest, "here")


def test_a_context_that_does_not_fit(analysed: Analysed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = analysed.built.bundle.manifest
    most = manifest.base.max_positions - 1
    message = refused(words(analysed, tmp_path / "report", "--context", str(most + 1)), capsys)
    assert f"--context: cannot be; got {most + 1}; need 0 to {most}" in message
    spec = AnalyzeSpec(analysed.built.bundle.root, analysed.data)
    assert context_of(spec, manifest) == min(1024, most)


def test_nothing_is_analysed_after_a_bad_input(analysed: Analysed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and context are looked at before the first session."""
    monkeypatch.setattr("exporter.analysis.analyze.gate_section", lambda _: pytest.fail("worked before checking"))
    with pytest.raises(ExportError, match="--context"):
        analyze(AnalyzeSpec(analysed.built.bundle.root, analysed.data, context=10**6))
    with pytest.raises(InputError, match="cannot be opened"):
        analyze(AnalyzeSpec(analysed.built.bundle.root, analysed.data.with_name("absent")))


def test_onnxruntime_gpu_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of that name is then absent, the module is not."""

    def absent(package: str) -> str:
        if package == "onnxruntime":
            raise PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr("exporter.describe.version", absent)
    assert made_now().versions["onnxruntime"] == onnxruntime.__version__
    assert made_now().versions["numpy"] == "1.2.3"


def test_missing_packages_are_named(
    analysed: Analysed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("exporter.commands.analyze.find_spec", lambda name: None)
    assert main(words(analysed, tmp_path / "report")) == 3
    message = capsys.readouterr().err
    assert "not installed: jinja2, matplotlib. Fix: pip install '.[export,cpu,analyze]'" in message
