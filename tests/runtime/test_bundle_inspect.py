"""What `inspect` says of a bundle, and above all what it never says."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.bundle import open_bundle
from runtime.inspect import render, render_json, verification_of
from runtime.manifest import Check, ExpertInfo, MergeInfo, MergeMethod, VerifyLevel, VerifyReport
from tests.runtime.bundle_makers import make_bundle, make_manifest, make_report


def test_a_bundle_is_told_in_full(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "toy"))
    text = render(bundle)
    for line in (
        f"toy  (bundle {bundle.digest[:12]}, format 1)",
        "  name     toy-llama (llama, float32)",
        "    0 -> math -> math-lora  (rank 4, 4 sites)",
        "    1 -> code -> code-lora  (rank 5, 4 sites)",
        "  count   4",
        "  kind          depth 1, one row per site",
        "  dynamic: dynamic, portable, opset 18, K/V cache append",
        "  static: static of code=0.3, math=0.7, portable, opset 18, K/V cache append",
        "  dynamic: verified, level full (numbers of this model), stage A; stage B: not needed (fp32)",
        "    ok   kl_mean         1e-09 (limit 1e-07)  at prompt 3, position 5",
        "  static: NOT VERIFIED (level structure: no numbers of this model were compared; "
        "proved: shapes and bytes of this model)",
        "  weights    52.7 kB in 2 files",
        "  golden     31 B in 1 file",
        "  torch   2.13.0",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("mix", "sites", "merge", "line"),
    [
        ({}, 0, None, "static: static of the base alone, portable"),
        ({"math": 1.0}, 2, MergeInfo(), "static: static of math=1 and 2 modules' own weights, portable"),
        (
            {},
            2,
            MergeInfo(method=MergeMethod.SVD, rank=4),
            "of 2 modules' own weights, merged by svd, rank 4, portable",
        ),
        ({"code": 0.5}, 0, MergeInfo(method=MergeMethod.CAT), "static of code=0.5, merged by cat, portable"),
    ],
)
def test_a_merge_is_told(mix: dict[str, float], sites: int, merge: MergeInfo | None, line: str, tmp_path: Path) -> None:
    manifest = make_manifest()
    own = {site.path: {"code": 1.0} for site in manifest.sites[:sites]}
    dynamic, static = manifest.graphs
    static = static.model_copy(update={"mix": mix, "mix_sites": own, "merge": merge})
    assert line in render(open_bundle(make_bundle(tmp_path / "x", graphs=(dynamic, static))))


def test_json_is_the_manifest_byte_for_byte(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "toy"))
    assert render_json(bundle).encode() == (bundle.root / "manifest.json").read_bytes()


def test_a_bundle_without_experts_or_gate_is_told(tmp_path: Path) -> None:
    dynamic = make_manifest().graphs[:1]
    bundle = open_bundle(
        make_bundle(tmp_path / "x", experts=(), sites=(), gate=None, graphs=dynamic, reports=(), tokenizer=None)
    )
    assert "experts: none\n" in render(bundle)
    assert "gate: none\n" in render(bundle)
    assert "dynamic: NOT VERIFIED (no report)" in render(bundle)


def _report(level: VerifyLevel, *checks: Check) -> VerifyReport:
    return make_report("dynamic", level).model_copy(update={"checks": checks})


GOOD = Check(name="kl", value=0.0, limit=1.0, passed=True)
BAD = Check(name="flips", value=2.0, limit=0.0, passed=False)


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (_report(VerifyLevel.FULL, GOOD), "verified, level full"),
        (_report(VerifyLevel.QUICK, GOOD), "verified, level quick"),
        (_report(VerifyLevel.STRUCTURE, GOOD), "NOT VERIFIED (level structure: no numbers"),
        (_report(VerifyLevel.FULL), "NOT VERIFIED (level full: no numbers"),
        (_report(VerifyLevel.FULL, GOOD, BAD), "NOT VERIFIED (level full: failed flips)"),
    ],
)
def test_only_compared_numbers_within_limits_count_as_verified(report: VerifyReport, text: str) -> None:
    assert verification_of(make_manifest(reports=(report,)), "dynamic").startswith(text)


def test_terminal_codes_and_line_breaks_are_shown_not_obeyed(tmp_path: Path) -> None:
    evil = "x\x1b[2J\n  dynamic: verified, level full"
    experts = tuple(
        ExpertInfo(column=i, name=name, key="0", folder=evil, rank=4, sites=4)
        for i, name in enumerate(("math", "code"))
    )
    text = render(open_bundle(make_bundle(tmp_path / "x", experts=experts)))
    assert "\x1b" not in text
    assert "x\\x1b[2J\\n  dynamic: verified" in text


def test_top_k_is_told(tmp_path: Path) -> None:
    gate = make_manifest().gate
    assert gate is not None
    gate = gate.model_copy(update={"top_k": 1, "softmax_topk": True, "layerwise": False, "softmax": False})
    text = render(open_bundle(make_bundle(tmp_path / "x", gate=gate)))
    assert "1, softmax over the kept per token" in text
    assert "one row shared by all sites" in text
    assert "  softmax       none" in text
