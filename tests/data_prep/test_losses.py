"""What of the input is not kept is said, and ends the preparation where it is much."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_prep.__main__ import main
from data_prep.documents import Document
from data_prep.sources import archive
from data_prep.sources.build import build_source
from kabrn_dist.utils.errors import UserError
from tests.support import corpora as data


def read(kind: str, *inputs: Path, **options: Any) -> tuple[list[Document], dict[str, int]]:
    source = build_source(kind, inputs, options)
    return [document for unit in source.units() for document in source.read(unit)], dict(source.left_out)


def prepare(*arguments: object) -> int:
    return main(["--source", "text", "--tokenizer", "bytes", *map(str, arguments)])


def report_of(out: Path) -> dict[str, Any]:
    (source,) = json.loads((out / "report.json").read_text())["sources"]
    return dict(source)


ONE = data.make_tar({f"a{n}.txt": f"first archive, text {n}" for n in range(30)})
TWO = data.make_tar({f"b{n}.txt": f"second archive, text {n}" for n in range(30)})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("both.tar", ONE + TWO),
        ("both.tar.gz", gzip.compress(ONE) + gzip.compress(TWO)),
        ("one.tar.gz", gzip.compress(ONE + TWO)),
        ("both.tar.zst", zstandard.compress(ONE) + zstandard.compress(TWO)),
        ("BOTH.TAR", ONE + bytes(4096) + TWO),
    ],
)
def test_all_of_several_archives_in_one_file_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    found, _ = read("text", tmp_path / name)
    assert sorted(document.name for document in found) == sorted(f"{s}{n}.txt" for s in "ab" for n in range(30))


def test_what_follows_an_archive_and_is_none_is_damage(tmp_path: Path) -> None:
    for name, content in (("a.tar.gz", ONE + b"x" * 512 + TWO), ("b.tar.gz", ONE[:1024] + b"x" * 512 + ONE[1024:])):
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match=r"cannot be read \(no tar archive, or damaged"):
            read("text", tmp_path / name)


def test_members_that_are_not_read_are_counted(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in ("blobs/01", "p.txt", "q.PDF"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"text"))
        for name, kind in (("x/hard.txt", tarfile.LNKTYPE), ("x/soft.txt", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "blobs/01"
            tar.addfile(member)
    (tmp_path / "a.tar").write_bytes(packed.getvalue())
    found, left_out = read("text", tmp_path / "a.tar")
    assert [document.text for document in found] == ["text"]
    assert left_out == {"that are links in archives": 2, "without an ending": 1, "ending in .pdf": 1}


def test_zip_files_lose_no_member(tmp_path: Path) -> None:
    def pack(*names: str) -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as file:
            for number, name in enumerate(names):
                file.writestr(name, f"{number} {name}")
        return packed.getvalue()

    with pytest.warns(UserWarning, match="Duplicate name"):
        (tmp_path / "same.zip").write_bytes(pack("a.txt", "b.TXT", "a.txt"))
    found, _ = read("text", tmp_path / "same.zip")
    assert [document.text for document in found] == ["0 a.txt", "2 a.txt", "1 b.TXT"]
    (tmp_path / "two.zip").write_bytes(pack("a.txt") + pack("b.txt"))
    with pytest.raises(UserError, match="another zip file lies before"):
        read("text", tmp_path / "two.zip")


def test_endings_count_in_upper_case_and_other_files_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.dumps({"text": "a line"}).encode()
    names = {
        "a.TXT": b"one",
        "b.Jsonl": line,
        "c.txt.GZ": gzip.compress(b"three"),
        "d.TAR": data.make_tar({"E.TXT": "4"}),
    }
    names |= {"f.jsonl.ZST": zstandard.compress(line), "g.ZIP": b"", "h.pdf": b"%", "i.PDF": b"%", "README": b"x"}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("z.TXT", "five")
    root = data.write_folder(tmp_path / "in", names | {"g.ZIP": packed.getvalue()})
    found, left_out = read("text", root)
    assert [document.text for document in found] == ["one", "a line", "three", "4", "a line", "five"]
    assert left_out == {"ending in .pdf": 2, "without an ending": 1}
    assert prepare("--input", root, "--out", tmp_path / "set") == 0
    assert "files not read: 2 ending in .pdf, 1 without an ending" in capsys.readouterr().out
    assert report_of(tmp_path / "set")["left_out"] == {"ending in .pdf": 2, "without an ending": 1}


def test_a_large_text_is_read_in_stretches_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive.read_stretches, "__defaults__", (1 << 16, 1 << 12))
    words = "".join(f"words of a löng book, number {n}\n{'' if n % 9 else chr(10)}" for n in range(9000))
    root = data.write_folder(tmp_path / "in", {"book.txt": words, "bare.txt": "é" * 40_000, "small.txt": "small"})
    (root / "packed.txt.gz").write_bytes(gzip.compress(words.replace("book", "look").encode()))
    found, _ = read("text", root)
    for name, text in (
        ("book.txt", words),
        ("bare.txt", "é" * 40_000),
        ("packed.txt.gz", words.replace("book", "look")),
    ):
        parts = [document for document in found if document.name.startswith(f"in/{name} byte")]
        assert "".join(part.text or "" for part in parts) == text
        assert max(len((part.text or "").encode()) for part in parts) <= 1 << 12
    book = [document.text or "" for document in found if document.name.startswith("in/book.txt byte")]
    assert all(text.endswith("\n\n") for text in book[:-1])
    assert prepare("--input", root, "--out", tmp_path / "set") == 0
    shown = capsys.readouterr().out
    assert f"{len(found) - 1:,} of the documents are stretches of larger texts" in shown


def test_a_large_text_that_repeats_itself_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive.read_stretches, "__defaults__", (1 << 16, 1 << 12))
    text = "the same line again and again\n" * 4000
    root = data.write_folder(tmp_path / "in", {"a.txt": text, "copy.txt": text})
    (tmp_path / "r.yaml").write_text(
        f"out: {tmp_path}/set\ntokenizer: {{bytes: true}}\nclean: {{quality: 'off', repetition: 'off'}}\n"
        f"sources: [{{name: a, kind: text, input: {root}}}]\n"
    )
    assert main(["--recipe", str(tmp_path / "r.yaml")]) == 0
    index = json.loads((tmp_path / "set" / "index.json").read_text())["sources"][0]
    assert index["train"]["text_bytes"] + index["validation"]["text_bytes"] == len(text)


def test_losing_much_of_the_input_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {f"{n}.txt": f"text number {n}" for n in range(20)}
    root = data.write_folder(tmp_path / "in", good | {"a.txt": b"\0" * 5000})
    assert prepare("--input", root, "--out", tmp_path / "set") == 2
    said = capsys.readouterr()
    assert "1 of 21 documents cannot be read (first: in/a.txt: binary" in said.err and "5,000 bytes of 5,2" in said.err
    assert "1 unreadable, 5,000 bytes (first: in/a.txt" in said.out
    root = data.write_folder(tmp_path / "latin", good | {"a.txt": b"caf\xe9 " * 1000})
    assert prepare("--input", root, "--out", tmp_path / "set2") == 2
    said = capsys.readouterr()
    assert "are no UTF-8 text" in said.err and "1 encoding (5,000 bytes)" in said.out


def test_what_could_not_be_read_counts_in_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data.write_folder(tmp_path / "in", {"a.txt": "some words", "b.txt": bytes(150_000)})
    assert prepare("--input", root, "--out", tmp_path / "set") == 2
    assert "2 documents, 0.2 MB; kept 1; removed 1 unreadable, 0.1 MB (first: " in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["a.txt.gz", "a.jsonl.gz", "a.zip", "a.jsonl"])
def test_the_bytes_of_a_damaged_file_count_as_lost(
    damaged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = random.Random(1).randbytes(20_000)
    content = gzip.compress(noise.hex().encode())[:-2000]
    if damaged == "a.zip":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", noise.hex())
        content = packed.getvalue().replace(packed.getvalue()[500:600], b"x" * 100)
    elif damaged == "a.jsonl":
        content = noise.replace(b"\n", b"-")
    texts = {f"{number}.txt": f"a small text of the number {number}" for number in range(12)}
    data.write_folder(tmp_path / "in", {**texts, damaged: content})
    # One of 13 documents, but most of the bytes.
    assert prepare("--input", tmp_path / "in", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "1 of 13 documents cannot be read" in error
    assert re.search(r", [1-9][0-9,]* bytes of ", error), error


def test_one_document_per_line_is_offered_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(50)))
    assert prepare("--input", tmp_path / "a.txt", "--unit", "line", "--out", tmp_path / "set") == 0
    assert report_of(tmp_path / "set")["documents"] == 50


@pytest.mark.parametrize("good", [300, 3_000])
def test_one_line_of_another_layout_ends_nothing(good: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = '{"text": "some %d words of a document that is long enough to count' + " for something" * 250 + '"}\n'
    odd = '{"content": "one line of another layout"}\n'
    root = data.write_folder(tmp_path / "in", {"a.jsonl": "".join(line % n for n in range(good)), "z.jsonl": odd})
    assert prepare("--input", root, "--out", tmp_path / "set", "--dry-run") == 0
    assert f"kept {good:,}; removed 1 unreadable (first: in/z.jsonl byte 0: found no text" in capsys.readouterr().out


def test_nulls_are_empty_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = '{"text": null}\n' * 120 + "".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(500))
    root = data.write_folder(tmp_path / "in", {"a.jsonl": lines})
    assert prepare("--input", root, "--out", tmp_path / "set") == 0
    assert "120 unreadable (first: in/a.jsonl byte 0: 'text' is null)" in capsys.readouterr().out
    data.write_folder(tmp_path / "numbers", {"a.jsonl": '{"text": 3}\n'})
    assert prepare("--input", tmp_path / "numbers", "--out", tmp_path / "other") == 2
    assert "no text under 'text' but a value of type int; source text expects" in capsys.readouterr().err


def test_answers_are_there_or_counted(tmp_path: Path) -> None:
    gsm = [
        ("One?", "a <<1+1=2>>2\n#### 2"),
        ("No mark?", "Reasoning without an end."),
        ("Empty?", "x\n####"),
        (" ", "1"),
    ]
    (tmp_path / "gsm.jsonl").write_text(data.to_jsonl([{"question": q, "answer": a} for q, a in gsm]))
    found, _ = read("openqa", tmp_path / "gsm.jsonl", answer="final")
    assert [document.text or document.problem for document in found] == [
        "Problem: One?\nAnswer: 2",
        "no #### before an answer",
        "an empty answer",
        "no #### before an answer",
    ]
    choices = [{"text": "one", "label": "1"}, {"text": "two", "label": 2}]
    records = [{"question": {"stem": "S?", "choices": choices}, "answerKey": key} for key in ("1", 2, "2", "9")]
    (tmp_path / "arc.jsonl").write_text(data.to_jsonl(records))
    answers = [
        (document.text or document.problem).rpartition(": ")[2]
        for document in read("openqa", tmp_path / "arc.jsonl")[0]
    ]
    assert answers == ["1. one", "2. two", "2. two", "no answer"]
    boxes = {
        f"train/x/{n}.json": {"problem": "P", "solution": s} for n, s in enumerate((r"\boxed{}", r"\boxed{ }", "7"))
    }
    found, _ = read("math", data.write_folder(tmp_path / "math", boxes), answer="final")
    assert [document.problem for document in found] == ["an empty answer"] * 2 + ["no \\boxed{} in the solution"]
    (tmp_path / "own.jsonl").write_text(data.to_jsonl([{"q": "Why?", "a": " "}, {"q": "", "a": "1"}]))
    found, _ = read("jsonl", tmp_path / "own.jsonl", question="q", answer="a")
    assert [document.problem for document in found] == ["an empty answer", "an empty question"]


def test_parquet_as_text_names_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data.write_folder(tmp_path / "in", {"a.parquet": b"PAR1"})
    for given in (root, root / "a.parquet"):
        assert prepare("--input", given, "--out", tmp_path / "set") == 2
        assert "--recipe FILE) a source with kind: parquet" in capsys.readouterr().err
