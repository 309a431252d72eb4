"""Sources: wrong layouts, damaged and unreadable files, wrong options, and limits of size."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_prep.documents import Document
from data_prep.prepare import scan
from data_prep.recipe import parse_recipe
from data_prep.sources import archive, files, lines, text
from data_prep.sources.build import build_source
from data_prep.sources.compression import decompress
from kabrn_dist.utils.errors import UserError
from tests.support import corpora as data

LEVELS = list(enumerate(([], {"of": 3}, "Level 3", 3, None)))
LINES = data.to_jsonl([{"text": f"line {n} é"} for n in range(400)]).encode()


def read(kind: str, *inputs: Path, **options: Any) -> list[Document]:
    source = build_source(kind, inputs, options)
    return [document for unit in source.units() for document in source.read(unit)]


def refused(kind: str, *inputs: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(kind, *inputs, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("nope", {}, "source 'nope': no such kind; choose from m2d2, math, amps"),
        ("math", {"splits": "x"}, "no option 'splits'; its options are: split, answer, levels, loss"),
        ("math", {"split": "dev"}, "source math: option 'split' is 'dev': Input should be 'train', 'test' or 'all'"),
        ("m2d2", {"domains": ["cs.XL"]}, "no domain 'cs.XL'; near are cs."),
        ("jsonl", {"question": "q"}, "question and answer belong together"),
        ("jsonl", {"loss": "answer"}, "loss: answer needs question and answer"),
        ("code", {"loss": "answer"}, "loss: answer needs a layout with questions"),
        ("code", {"solutions": 0}, "must be at least 1"),
        ("python-stdlib", {"field": "x"}, "no option 'field'; its options are: none"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, kind: str, options: dict[str, Any], expected: str) -> None:
    assert expected in refused(kind, *([] if kind == "python-stdlib" else [tmp_path]), **options)


def test_absent_and_double_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.pdf").write_text("a")
    assert "absent: no such file or folder" in refused("text", tmp_path / "absent")
    assert "a.pdf: unknown file type; give .txt, .jsonl, .tar" in refused("text", tmp_path / "a.pdf")
    assert "given twice" in refused("text", tmp_path / "a.txt", tmp_path / "b" / ".." / "a.txt")
    assert "needs at least one file" in refused("text")
    assert "drop the input" in refused("python-stdlib", tmp_path)


@pytest.mark.parametrize(
    ("kind", "names", "options", "expected"),
    [
        ("math", ["x/train.jsonl"], {}, "found x/train.jsonl; it looks like jsonl or openqa"),
        ("math", ["m/train/algebra/1.json"], {"split": "test"}, "its layout, but the options exclude it (split: tes"),
        ("text", ["m/train/algebra/1.json"], {}, "it looks like math; expected .txt or .jsonl files"),
        ("m2d2", ["amps/khan/1/2.json"], {}, "it looks like amps"),
        ("code", ["0/question.txt"], {}, "it looks like code with layout: apps"),
        ("code", ["train/0/question.txt"], {"layout": "apps", "split": "test"}, "its layout, but the options exclude"),
        ("jsonl", ["a.parquet"], {}, "it looks like parquet"),
        ("openqa", [], {}, "it is empty"),
    ],
)
def test_a_wrong_layout_says_what_was_found(
    tmp_path: Path, kind: str, names: list[str], options: dict[str, Any], expected: str
) -> None:
    root = tmp_path / "in"
    root.mkdir()
    found = dict.fromkeys(names, "{}")
    message = refused(kind, data.write_folder(root, found), **options)
    assert message.startswith(f"input {root}: no file for source {kind}; ") and expected in message
    (tmp_path / "in.tar").write_bytes(data.make_tar(found))
    assert expected in refused(kind, tmp_path / "in.tar", **options)


@pytest.mark.parametrize(
    ("kind", "name", "content", "expected"),
    [
        ("jsonl", "a.jsonl", '{"body": 1, "id": 1}\n', "byte 0: found no text under 'text' but 'body', 'id'; source"),
        ("jsonl", "a.jsonl", '{"question": "q", "answer": "a"}', "it looks like openqa"),
        (
            "jsonl",
            "a.jsonl",
            '{"body": 1, "id": 1}\n',
            "; name the key that holds the text: --field KEY, or options: {field:",
        ),
        ("jsonl", "a.jsonl", "[1]\n", "found a list"),
        ("jsonl", "a.jsonl", '{"text": \n', "found no JSON"),
        ("jsonl", "a.jsonl", f'{{"text": {"1" * 5000}}}', "found no JSON (Exceeds the limit"),
        ("openqa", "a.jsonl", '{"text": "x"}\n', "found 'text'; it looks like jsonl"),
        (
            "openqa",
            "a.jsonl",
            '{"question": {"stem": "s", "choices": []}, "answerKey": ["A"]}',
            "found 'question', 'answerKey'",
        ),
        ("math", "train/x/1.json", '{"question": "q", "hints": []}', "it looks like amps; source math expects"),
        ("amps", "khan/x/1.json", '{"problem": "q", "x": []}', "found 'problem', 'x'"),
        ("amps", "mathematica/x/y/1.txt", "Answer:\n1", "found 0 'Problem:' and 1 'Answer:' blocks"),
    ],
)
def test_records_of_another_layout_are_refused(
    tmp_path: Path, kind: str, name: str, content: str, expected: str
) -> None:
    root = data.write_folder(tmp_path / "in", {name: content})
    source = {"name": "a", "kind": kind, "input": [str(root)]}
    recipe = parse_recipe({"out": "set", "tokenizer": {"bytes": True}, "sources": [source]}, "test")
    with pytest.raises(UserError) as caught:
        scan(recipe, tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_single_bad_files_are_counted_not_fatal(tmp_path: Path) -> None:
    good = {f"train/algebra/{n}.json": data.MATH["train/algebra/1.json"] for n in range(300)}
    bad = {
        "train/algebra/0.json": "{",
        "train/algebra/7.json": {"other": 1},
        "train/algebra/8.json": b"\xff{}",
        "train/algebra/9.json": b"\0\0",
        "train/algebra/99.json": {"problem": "p", "solution": "s", "level": "\ud800"},
    }
    root = data.write_folder(tmp_path / "MATH", good | bad)
    os.symlink(tmp_path / "nowhere", root / "train/algebra/lost.json")
    os.symlink(root, root / "train/round")
    found = read("math", root)
    problems = {document.name.rpartition("/")[2]: document.problem for document in found if document.text is None}
    assert {name: words.partition(" (")[0] for name, words in problems.items()} == {
        "0.json": "found no JSON",
        "7.json": "found 'other'",
        "8.json": "not UTF-8: byte 0xff at 0",
        "9.json": "binary: a zero byte in its first 8 KiB",
        "lost.json": "No such file or directory",
    }
    assert len(found) == 301


def test_a_level_of_another_kind_is_no_level(tmp_path: Path) -> None:
    records = {f"train/algebra/{n}.json": {"problem": "p", "solution": "s", "level": level} for n, level in LEVELS}
    found = read("math", data.write_folder(tmp_path / "MATH", records), levels=(3,))
    assert [document.name.rpartition("/")[2] for document in found] == ["2.json"]


def test_text_that_cannot_be_decoded_is_kept_for_repair(tmp_path: Path) -> None:
    root = data.write_folder(
        tmp_path / "in", {"a.txt": b"caf\xe9", "b.txt": "wide".encode("utf-16"), "c.txt": b"\0bin"}
    )
    found = read("text", root)
    assert [document.raw for document in found] == [b"caf\xe9", "wide".encode("utf-16"), None]
    assert [document.text for document in found] == [None] * 3
    assert found[0].problem == "not UTF-8: byte 0xe9 at 3" and "UTF-16" in found[1].problem
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": "half \ud800"}).encode() + b'\n{"text": "\xe9"}\n')
    half, latin = read("jsonl", tmp_path / "a.jsonl")
    assert half.problem == "half a surrogate pair (U+D800) at character 5" and half.raw == b"half \xed\xa0\x80"
    assert latin.problem == "not UTF-8: byte 0xe9 at 10" and latin.raw is None


DAMAGED = {
    "a.txt.gz": b"plain",
    "b.txt.gz": gzip.compress(bytes(range(256)) * 50)[:-9],
    "c.jsonl.gz": gzip.compress(LINES)[:-20],
    "d.txt.zst": b"plain text",
    "e.jsonl.zst": zstandard.compress(LINES)[:-9],
    "f.tar": data.make_tar({"x.txt": "x"})[:-9000],
    "g.tar": data.make_tar({"x.txt": "x" * 4000})[:2000],
    "h.tar.gz": gzip.compress(data.make_tar({"x.txt": "x" * 4000}))[:-30],
    "i.tar.zst": zstandard.compress(data.make_tar({"x.txt": "x" * 4000}))[:-5],
    "j.zip": b"PK",
    "k.tar.gz": gzip.compress(b"no tar" * 500),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_fatal_where_named_and_counted_where_met(tmp_path: Path, name: str) -> None:
    root = data.write_folder(tmp_path / "in", {name: DAMAGED[name], "z.txt": "whole"})
    assert f"{name}: cannot be read (" in refused("text", root / name)
    found = read("text", root)
    assert found[-1].text == "whole" and [document.name for document in found if document.problem] == [f"in/{name}"]


def test_damaged_and_encrypted_zip_members_do_not_touch_the_others(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name in ("a.txt", "b.txt", "c.txt"):
            file.writestr(name, f"text of {name}")
    content = packed.getvalue().replace(b"text of a", b"text 0f a")
    at = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1) + 8
    (tmp_path / "x.zip").write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    assert [(document.text, document.problem[:8]) for document in read("text", tmp_path / "x.zip")] == [
        (None, "Bad CRC-"),
        (None, "File <Zi"),
        ("text of c.txt", ""),
    ]


def test_zstd_frames_follow_one_another_and_may_be_empty() -> None:
    packed = zstandard.compress(LINES[:99]) + zstandard.compress(b"") + zstandard.compress(LINES[99:])
    assert decompress(io.BytesIO(packed), "a.zst").read() == LINES
    assert decompress(io.BytesIO(b""), "a.zst").read() == b""


def test_what_is_too_large_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 16
    monkeypatch.setattr(archive.read_content, "__defaults__", (limit,))
    monkeypatch.setattr(archive.read_stretches, "__defaults__", (limit, limit // 4))
    monkeypatch.setattr(lines.iterate_lines, "__defaults__", (0, -1, limit))
    monkeypatch.setattr(text, "_PARAGRAPH_BYTES", limit)
    (tmp_path / "large.json").write_text("x\n" * limit)
    (found,) = read("math", tmp_path / "large.json")
    assert found.problem.startswith("larger than") and found.lost_bytes == 2 * limit
    (tmp_path / "a.txt").write_text("x\n" * limit)
    stretches = read("text", tmp_path / "a.txt")
    assert [len(document.text or "") for document in stretches] == [limit // 4] * 8
    assert stretches[1].name == f"a.txt byte {limit // 4}" and all(document.stretch for document in stretches)
    assert read("text", tmp_path / "a.txt", unit="paragraph")[0].problem.startswith("a paragraph above")
    (tmp_path / "b.txt").write_text("one\n" + "y" * 3 * limit + "\ntwo\n" + "z" * limit)
    found = read("text", tmp_path / "b.txt", unit="line")
    assert [document.text for document in found] == ["one", None, "two", "z" * limit]
    assert found[2].name == f"b.txt byte {3 * limit + 5}"


def test_inputs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a/train.txt", "b/train.txt"):
        data.write_folder(tmp_path, {name: name})
    found = read("text", tmp_path / "b/train.txt", tmp_path / "a/train.txt")
    assert [document.name for document in found] == ["a/train.txt", "b/train.txt"]


def test_parquet_says_what_is_wrong(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    assert "no column 'text', found 'body'" in refused("parquet", tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    assert "b.parquet: cannot be read (no parquet" in refused("parquet", tmp_path / "b.parquet")
    assert [document.problem[:10] for document in read("parquet", tmp_path, field="body")] == ["", "no parquet"]


def test_a_group_lists_only_the_folders_between_its_ends(tmp_path: Path) -> None:
    data.write_folder(tmp_path, {f"{name}/{n}": "x" for name in ("a", "a.b", "b", "c") for n in range(3)})
    names = [name for name, _ in files.walk_files(tmp_path)]
    assert names == sorted(names, key=lambda name: name.split("/"))
    for first, last in ((2, 7), (0, 0), (3, 11)):
        assert [name for name, _ in files.walk_files(tmp_path, names[first], names[last])] == names[first : last + 1]
    assert [name for name, _ in files.walk_files(tmp_path, skipped_folders=frozenset({"a", "b"}))] == names[
        3:6
    ] + names[9:]
