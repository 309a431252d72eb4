"""Names of files are bytes: what is no UTF-8 in them, or means something elsewhere, does no harm."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from kabrn_dist.data.shard_set import open_shard_folder
from tests.support import corpora as data
from tests.support.prepare import prepare

LATIN = os.fsdecode(b"caf\xe9")
ODD = [LATIN, "a b", "new\nline", "-x", "#1", "~", "a@000000000000005", "\u202edcba", "é", "e\u0301", "$HOME", "%s{0}"]


def run(*arguments: object) -> int:
    # As the streams of a terminal are.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    return prepare(*arguments)


def test_texts_in_files_of_any_name_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / f"in {LATIN}"
    for number, name in enumerate(ODD):
        data.write_folder(
            root, {f"{name}.txt": f"a text in a file, number {number}", f"{name}/b.txt": f"more {number}"}
        )
    (root / f"{LATIN}.b{LATIN}").write_text("another kind of file")
    base = ("--source", "text", "--input", root, "--tokenizer", "bytes", "--out", tmp_path / "set")
    for _ in range(2):
        assert run(*base) == 0
        assert capsys.readouterr().err == ""
    assert open_shard_folder(tmp_path / "set").index.text_bytes("train") > 300
    documents = json.loads((tmp_path / "set" / "report.json").read_text())["documents"]
    assert documents["read"] == 2 * len(ODD)
    assert run(*base, "--dry-run") == 0


def test_members_of_any_name_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / f"{LATIN}.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for number, name in enumerate(ODD):
            path = tmp_path / "x"
            path.write_text(f"a text in a file, number {number}")
            tar.add(path, f"{name}.txt")
    base = ("--source", "text", "--input", tmp_path / f"{LATIN}.tar", "--tokenizer", "bytes")
    assert run(*base, "--out", tmp_path / "set") == 0
    assert run(*base, "--out", tmp_path / f"set {LATIN}") == 0
    first, second = (open_shard_folder(tmp_path / name).index for name in ("set", f"set {LATIN}"))
    assert first == second


def test_messages_about_files_of_any_name_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ODD:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(b"no gzip")
        (tmp_path / f"{name}.txt.gz").write_bytes(b"no gzip")
        for given in (path, tmp_path / f"{name}.txt.gz", tmp_path / f"{name}.txt"):
            assert run("--source", "text", "--input", given, "--tokenizer", "bytes", "--out", tmp_path / "set") == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1 + error.count("new\nline"), error
