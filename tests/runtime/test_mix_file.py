"""Mix files: what a row a site means, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.mix_file import MixFile, read_mix, scalings_from_file, write_mix

SITES = ("a.q", "a.v", "b.q")


def test_sites_have_their_own_weights_or_everybodys(tmp_path: Path) -> None:
    mix = MixFile(weights={"math": 0.5, "code": 0.25}, sites={"a.v": {"code": 1.0}})
    write_mix(mix, tmp_path / "mix.json")
    assert read_mix(tmp_path / "mix.json") == mix
    rows = scalings_from_file(mix, ("code", "math"), SITES)
    assert rows.tolist() == [[0.25, 0.5], [1.0, 0.0], [0.25, 0.5]]
    assert scalings_from_file(MixFile(weights={"math": 1.0}), ("code", "math"), SITES).tolist() == [[0.0, 1.0]]


def test_unknown_experts_and_sites_are_named() -> None:
    with pytest.raises(UserError, match=r"no site 'c\.q'"):
        scalings_from_file(MixFile(sites={"c.q": {}}), ("math",), SITES)
    with pytest.raises(UserError, match="no expert 'poetry'"):
        scalings_from_file(MixFile(sites={"a.q": {"poetry": 1.0}}), ("math",), SITES)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"weights": {"a": NaN}}', '{"weights": {"a": "1"}}', '{"weight": {}}', '{"format_version": 2}'],
)
def test_what_is_no_mix(text: str, tmp_path: Path) -> None:
    (tmp_path / "mix.json").write_text(text)
    with pytest.raises(UserError, match=r"mix\.json: is no mix; got "):
        read_mix(tmp_path / "mix.json")
    with pytest.raises(UserError, match=r"absent\.json: cannot read the mix"):
        read_mix(tmp_path / "absent.json")
