"""Which files a preparation replaces or reads: its own and those it was given, never what only looks like them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import yaml

from data_prep.sources.build import build_source
from data_prep.sources.files import walk_files
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.utils.errors import UserError
from tests.support import corpora as data
from tests.support.prepare import prepare, refuse


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("report.")
    }


def make_texts(folder: Path, count: int = 20) -> Path:
    return data.write_folder(folder, {f"{n}.txt": f"text number {n} of the corpus" for n in range(count)})


def test_force_leaves_files_that_only_have_the_names_of_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, out = make_texts(tmp_path / "in"), tmp_path / "set"
    archive = data.make_tar({f"{n}.txt": f"document {n}" for n in range(20)})
    names = ("wiki-train-00.tar", "text-train-00000.tar", "tokenizer.json", "report.md", "report.json", "x.tar.tmp")
    for name in names:
        data.write_folder(out, {name: archive})
        base = ("--source", "text", "--input", texts, "--tokenizer", "bytes", "--out", out)
        assert name in refuse(capsys, *base, "--force")
        assert contents(out) in ({name: hashlib.sha256(archive).hexdigest()}, {})
        assert (out / name).read_bytes() == archive
        (out / name).unlink()


def test_force_replaces_what_the_index_names_and_refuses_beside_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--source", "text", "--input", make_texts(tmp_path / "in"), "--out", tmp_path / "set")
    assert prepare(*base, "--tokenizer", "bytes") == 0
    made = contents(tmp_path / "set")
    (tmp_path / "set" / "other-train-00000.tar").write_bytes(b"mine")
    assert "other-train-00000.tar" in refuse(capsys, *base, "--vocabulary", 300, "--force")
    (tmp_path / "set" / "other-train-00000.tar").unlink()
    assert contents(tmp_path / "set") == made and not (tmp_path / "set" / ".work").exists()
    assert prepare(*base, "--vocabulary", 300, "--force") == 0
    assert open_shard_folder(tmp_path / "set").index.vocabulary > 257


def test_an_index_of_something_else_names_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = make_texts(tmp_path / "in")
    for content in ("{", '["index"]', '{"fingerprint": "x", "sources": [{"name": "../../in/1.txt"}]}', "[" * 5000):
        out = data.write_folder(tmp_path / "set", {"index.json": content})
        base = ("--source", "text", "--input", texts, "--tokenizer", "bytes", "--out", out, "--force")
        assert "holds index.json" in refuse(capsys, *base)
        assert (out / "index.json").read_text() == content


def test_a_file_that_appears_while_a_preparation_is_unfinished_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = data.write_folder(tmp_path / "set", {})
    out.mkdir()
    monkeypatch.setattr(
        "data_prep.prepare.plan_shards", lambda *a: (_ for _ in ()).throw(UserError("stopped before the plan"))
    )
    base = ("--source", "text", "--input", make_texts(tmp_path / "in"), "--tokenizer", "bytes", "--out", out)
    assert "stopped" in refuse(capsys, *base)
    monkeypatch.undo()
    (out / "tokenizer.json").write_text("mine")
    assert "tokenizer.json: was not made by this preparation" in refuse(capsys, *base)
    assert (out / "tokenizer.json").read_text() == "mine"
    (out / "tokenizer.json").unlink()
    assert prepare(*base) == 0


def test_an_input_in_the_output_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = make_texts(tmp_path / "in")
    (tmp_path / "link").symlink_to(texts)
    base = ("--source", "text", "--tokenizer", "bytes", "--force")
    for input, out in ((texts, texts), (texts / "1.txt", texts), (texts, tmp_path / "link"), (texts, tmp_path)):
        before = contents(tmp_path)
        assert "holds the input" in refuse(capsys, *base, "--input", input, "--out", out)
        assert contents(tmp_path) == before
    assert prepare("--source", "text", "--input", texts, "--vocabulary", 300, "--out", tmp_path / "set") == 0
    own = ("--input", texts, "--tokenizer", tmp_path / "set" / "tokenizer.json", "--out", tmp_path / "set")
    assert "holds the tokenizer" in refuse(capsys, "--source", "text", *own, "--force")


def test_an_output_folder_inside_the_input_is_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = make_texts(tmp_path / "in")
    (texts / "again").symlink_to(texts / "shards")
    base = ("--source", "text", "--input", texts, "--tokenizer", "bytes", "--out", texts / "shards")
    assert prepare(*base) == 0
    made = contents(texts / "shards")
    assert prepare(*base) == 0 and "nothing to do" in capsys.readouterr().out
    assert prepare(*base, "--force") == 0 and contents(texts / "shards") == made


@pytest.mark.parametrize("name", ["precious #2", "2026-11-28", "0123", "a: b", "null", "[x", "&a", "~", "1e5"])
def test_a_folder_on_the_command_line_is_taken_as_it_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_texts(tmp_path / "in")
    sources = [{"name": "a", "kind": "text", "input": "in"}]
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"out": "x", "tokenizer": {"bytes": True}, "clean": {"quality": "off"}, "sources": sources})
    )
    monkeypatch.chdir(tmp_path)
    assert prepare("--recipe", "r.yaml", "--out", name, "--dry-run") == 0
    assert f"dry run: {name} was not touched" in capsys.readouterr().out


def test_circles_among_links_end(tmp_path: Path) -> None:
    for name in "abc":
        data.write_folder(tmp_path / name, {"x.txt": name})
    for name in "abc":
        for other in "abc":
            os.symlink(tmp_path / other, tmp_path / name / f"to-{other}")
    found = [name for name, _ in walk_files(tmp_path)]
    assert found[:3] == ["a/to-b/to-c/x.txt", "a/to-b/x.txt", "a/to-c/to-b/x.txt"] and len(found) == 15
    for name in range(9):
        (tmp_path / "many" / str(name)).mkdir(parents=True)
    for name in range(9):
        for other in range(9):
            os.symlink(tmp_path / "many" / str(other), tmp_path / "many" / str(name) / f"to-{other}")
    with pytest.raises(UserError, match="links to folders in one path"):
        list(walk_files(tmp_path / "many"))


def test_a_link_to_itself_is_a_file_that_cannot_be_read_and_ends_nothing(tmp_path: Path) -> None:
    data.write_folder(tmp_path, {"a.txt": "a", "z.txt": "z"})
    os.symlink("loop.txt", tmp_path / "loop.txt")
    os.symlink("round", tmp_path / "round")
    assert list(walk_files(tmp_path)) == [("a.txt", 1), ("loop.txt", 0), ("round", 0), ("z.txt", 1)]
    source = build_source("text", [tmp_path], {})
    found = [document for unit in source.units() for document in source.read(unit)]
    assert [document.text for document in found] == ["a", None, "z"]
    assert "symbolic links" in found[1].problem and source.left_out == {"without an ending": 1}


@pytest.mark.parametrize("option", ["--out", "--input"])
def test_an_empty_path_is_not_the_current_folder(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_texts(tmp_path / "in")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    paths = {"--input": str(tmp_path / "in"), "--out": str(tmp_path / "set"), option: ""}
    words = [word for pair in paths.items() for word in pair]
    assert prepare("--source", "text", "--tokenizer", "bytes", *words) == 2
    assert "the path is empty" in capsys.readouterr().err
    assert not list((tmp_path / "here").iterdir())
