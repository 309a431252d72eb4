"""Documents agree with the results of the benchmarks, are short, and their links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from benchmarks import tables
from benchmarks.results import Results
from kabrn_dist.config import Config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_figures_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_markers_are_filled_from_results(tmp_path: Path) -> None:
    row = {"name": "a, rival: b", "ours": 2.0, "rival": 3000.0, "unit": "ms", "ratio": 1500.0}
    (tmp_path / "x.json").write_text(json.dumps({"machine": {}, "rows": [row], "aims": {}}))
    results = Results(tmp_path)
    contents = {"t": lambda r: f"| {r.figure('x', 'a, .*', 'rival'):,.0f} |"}
    text = "<!-- table: t -->\nold\n<!-- end -->\nat <!-- value: t -->old<!-- end --> ms"
    filled = tables.fill_document(text, results, contents, contents)
    assert filled == "<!-- table: t -->\n| 3,000 |\n<!-- end -->\nat <!-- value: t -->| 3,000 |<!-- end --> ms"
    assert tables.fill_document(filled, results, contents, contents) == filled
    assert results.figure("x", "c", "ours") is None and results.figure("unknown", "a", "ours") is None
    assert results.figure("x", "a, .*", "share") == 1 / 1500
    with pytest.raises(KeyError):
        tables.fill_document("<!-- value: nobody --><!-- end -->", results)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_pages_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path == ROOT / "README.md":
        assert len(text.splitlines()) <= 130
    # The reference of the configuration is generated, and as long as there are keys; so are tables of results.
    elif path.name != "configuration.md":
        written = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
        assert len(written.splitlines()) <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target), link
        if target.suffix == ".png":
            assert target.stat().st_size <= 150_000, link


def headings(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|md|yaml|c))`", text):
        if "NAME" not in name:
            assert (ROOT / name).exists() or (ROOT / "kabrn_dist" / name).exists(), name


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if path.name != "configuration.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_keys_that_are_named_exist(path: Path) -> None:
    sections = "|".join(Config.model_fields)
    text = path.read_text(encoding="utf-8")
    for name in re.findall(rf"`((?:{sections})(?:\.\w+)+)", text):
        section, *keys = name.split(".")
        found = Config.model_fields[section].annotation
        # A section that may be absent.
        found = next((each for each in get_args(found) if each is not type(None)), found)
        for key in keys:
            assert isinstance(found, type) and issubclass(found, BaseModel) and key in found.model_fields, name
            found = found.model_fields[key].annotation
