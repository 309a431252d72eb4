"""Sources: what is read from which files, and what is refused."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import pytest
import zstandard

from data_prep.prepare import collect
from data_prep.sources import Document, python_stdlib, text
from kabrn_dist.errors import UserError

LINES = "".join(json.dumps({"text": f"line {n} é", "id": n}) + "\n" for n in range(5)).encode()


def read(*inputs: Path, field: str = "text") -> list[str | None]:
    return [document.text for document in text.documents(text.find_files(inputs), field)]


def test_every_file_type_gives_the_same_documents(tmp_path: Path) -> None:
    frames = zstandard.compress(LINES[:40]) + zstandard.compress(LINES[40:])
    for name, content in (
        ("a.jsonl", LINES + b"\n  \n"),
        ("b.jsonl.gz", gzip.compress(LINES[:40], mtime=0) + gzip.compress(LINES[40:], mtime=0)),
        ("c.jsonl.zst", frames),
    ):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == [f"line {n} é" for n in range(5)]
    whole = "one\r\ndocument é"
    for name, content in (
        ("a.txt", whole.encode()),
        ("b.txt.gz", gzip.compress(whole.encode(), mtime=0)),
        ("c.txt.zst", zstandard.compress(whole.encode())),
    ):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == [whole]


def test_folders_are_sorted_and_other_files_in_them_left_alone(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("z.txt", "a.txt", "deep/m.txt", "notes.md", "shard.tar"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "deep/m.txt", "z.txt"]
    assert read(tmp_path / "z.txt", tmp_path / "deep") == ["z.txt", "deep/m.txt"]


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 1}\n')
    assert read(tmp_path, field="content") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pdf", b"x", "a.pdf: unknown file type; give files that end in .txt"),
        ("a.txt", b"ok \xe9t\xe9", "a.txt: not UTF-8, byte 0xe9 at 3. Convert"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl line 2: not UTF-8, byte 0xe9 at 10"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2: not JSON"),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}\n',
            "line 1: no text under 'text', found 'body', 'id'. Name the right",
        ),
        ("a.jsonl", b'{"text": 5}\n', "line 1: no text under 'text'"),
        ("a.jsonl", b"[1]\n", "line 1: no text under 'text', found a list"),
        ("a.txt.gz", b"plain", "a.txt.gz: cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-9], "a.txt.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
        ("a.txt.zst", b"plain text", "a.txt.zst: cannot be read"),
        ("a.txt.zst", zstandard.compress(LINES * 9)[:-9], "ends in the middle of a zstd frame"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_absent_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: no such file or folder"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match="no file in it ends in"):
        read(tmp_path)


def test_python_stdlib_reads_sources_and_skips_what_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.py", "a/c.py", "a/test/t.py", "site-packages/p.py", "__pycache__/q.py", "readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    real = {document.name: document.text for document in python_stdlib.documents()}
    assert real["json/decoder.py"] == (Path(sysconfig.get_path("stdlib")) / "json/decoder.py").read_bytes().decode()
    assert list(real) == sorted(real) and not any("test" in name.split("/") for name in real)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    found = list(python_stdlib.documents())
    assert found == [("a/c.py", "a/c.py"), ("b.py", "b.py"), ("latin.py", None)]


def test_collecting_counts_and_splits_by_content_alone() -> None:
    documents = [Document(str(n), f"text {n}") for n in range(400)]
    extra = [
        Document("again", "text 7"),
        Document("nothing", ""),
        Document("half", "\ud800"),
        Document("bad", None),
    ]
    corpus = collect([*documents, *extra], 0.1)
    assert (corpus.duplicates, corpus.empty, corpus.not_utf8) == (1, 1, ("half", "bad"))
    assert len(corpus.train) + len(corpus.validation) == 400 and 20 < len(corpus.validation) < 60
    assert collect(reversed(documents), 0.1).validation == corpus.validation
    more = collect([*documents, *(Document(str(n), f"other {n}") for n in range(400))], 0.1)
    assert set(corpus.validation) <= set(more.validation) and set(corpus.train) <= set(more.train)
    assert corpus.train != [document.text for document in documents if document.text in set(corpus.train)]
    assert len(collect(documents[:2], 0.001).validation) == 1
    assert collect(documents[:1], 0.0).validation == []


@pytest.mark.parametrize(("texts", "share"), [([], 0.0), (["", ""], 0.05), (["only one"], 0.05)])
def test_an_empty_corpus_is_refused(texts: list[str], share: float) -> None:
    with pytest.raises(UserError, match=r"corpus: . distinct documents .* Give more documents"):
        collect([Document("x", text) for text in texts], share)
