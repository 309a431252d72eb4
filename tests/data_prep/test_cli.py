"""`python -m data_prep` from outside: what it writes, prints and refuses."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kabrn_dist.data.corpus import open_folder_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.data.index import SplitName
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.token_stream import stream_naive
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN
from tests.support.prepare import prepare, refuse

ROOT = Path(__file__).parents[2]


def command(*arguments: object, file_bytes: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_prep", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(3)
    words = np.array(["the", "cat", "é", "sat", "on", "mats", "while", "rats", "ran", "😀", "off\n"])
    for n in range(60):
        (folder / f"{n:03d}.txt").write_text(" ".join(random.choice(words, random.integers(20, 9000))))
    (folder / "special.txt").write_text(f"{DOCUMENT_TOKEN} is only text here {DOCUMENT_TOKEN}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Without the report, which tells the time that it took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("report.")}


def test_python_stdlib_end_to_end(tmp_path: Path) -> None:
    done = command("--source", "python-stdlib", "--out", tmp_path / "set", "--vocabulary", 1024, "--shard-mb", 4)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout and "MB/s" in done.stdout and done.stderr == ""
    index = open_shard_folder(tmp_path / "set").index
    assert index.vocabulary == 1024 and index.dtype == "uint16" and len(index.sources[0].train.shards) > 1
    assert 1 < 8 * index.gzip9_bytes("validation") / index.text_bytes("validation") < 3
    assert (
        TokenDataset(open_folder_corpus(tmp_path / "set"), "validation", 256, seed=0, ordered=False).num_sequences > 100
    )
    shown = command("inspect", tmp_path / "set", "--documents", 2)
    assert shown.returncode == 0 and "all shards verified" in shown.stdout
    assert shown.stdout.count("--- train document") == 2 and f"{index.tokens('train'):,}" in shown.stdout
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["documents"]["train"] == index.documents("train") and report["fingerprint"] == index.fingerprint
    assert "<h2>python-stdlib</h2>" in (tmp_path / "set" / "report.html").read_text()


@pytest.mark.slow
def test_a_second_run_gives_the_same_bytes_and_every_document(texts: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert prepare("--source", "text", "--input", texts, "--out", tmp_path / name, "--vocabulary", 300) == 0
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert not any(name.endswith(".tmp") or name == ".work" for name in contents(tmp_path / "first"))
    shards = open_shard_folder(tmp_path / "first")
    index, tokenizer = shards.index, shards.tokenizer()
    sizes = tokenizer.bytes_per_token()
    found: list[str] = []
    splits: tuple[SplitName, ...] = ("train", "validation")
    for name in splits:
        split = index.sources[0].split(name)
        stream = stream_naive(tmp_path / "first", index, name)
        assert sizes[stream].sum() == split.text_bytes
        documents = np.split(stream, np.flatnonzero(stream == index.document_token))[1:]
        assert len(documents) == split.documents
        texts_found = [tokenizer.decode(document[1:].tolist()) for document in documents]
        if name == "validation":
            packed = gzip.compress("".join(texts_found).encode(), 9)
            assert len(packed) == split.gzip9_bytes
        found += texts_found
    assert sorted(found) == sorted(path.read_bytes().decode() for path in texts.iterdir())


def test_own_tokenizers(texts: Path, tmp_path: Path) -> None:
    assert prepare("--source", "text", "--input", texts, "--out", tmp_path / "a", "--vocabulary", 300) == 0
    mine = tmp_path / "a" / "tokenizer.json"
    assert prepare("--source", "text", "--input", texts, "--out", tmp_path / "b", "--tokenizer", mine) == 0
    made, again = contents(tmp_path / "a"), contents(tmp_path / "b")
    # What it was made from differs: a trained tokenizer and one that was given.
    assert made.pop(".inputs") != again.pop(".inputs")
    assert made == again
    assert prepare("--source", "text", "--input", texts, "--out", tmp_path / "c", "--tokenizer", "bytes") == 0
    index = open_shard_folder(tmp_path / "c").index
    assert (index.vocabulary, index.document_token, index.tokenizer.kind) == (257, 256, "bytes")
    assert index.tokens("train") == index.text_bytes("train") + index.documents("train")
    assert json.loads((tmp_path / "c" / "tokenizer.json").read_text()) == {"kind": "bytes"}


def test_dry_run_writes_nothing(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("--source", "text", "--input", texts, "--out", tmp_path / "set", "--dry-run") == 0
    assert "dry run" in capsys.readouterr().out and not (tmp_path / "set").exists()


def test_force_replaces_own_files_only(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--source", "text", "--input", texts, "--out", tmp_path / "set")
    assert prepare(*base, "--tokenizer", "bytes", "--shard-mb", 0.2) == 0
    before = contents(tmp_path / "set")
    assert len(before) > 4
    assert prepare(*base, "--tokenizer", "bytes", "--shard-mb", 0.2) == 0
    assert "nothing to do" in capsys.readouterr().out
    message = refuse(capsys, *base, "--tokenizer", "bytes")
    assert "is not empty, it holds data of other settings: shard_mb 0.2 (now 64)" in message
    assert "too small" in refuse(capsys, *base, "--vocabulary", 5, "--force")
    assert contents(tmp_path / "set") == before
    (tmp_path / "set" / "notes.md").write_text("mine")
    assert "holds notes.md" in refuse(capsys, *base, "--tokenizer", "bytes", "--force")
    (tmp_path / "set" / "notes.md").unlink()
    assert prepare(*base, "--tokenizer", "bytes", "--force") == 0
    after = contents(tmp_path / "set")
    assert set(after) == {
        ".inputs",
        "index.json",
        "tokenizer.json",
        "text-train-00000.tar",
        "text-validation-00000.tar",
    }


def test_a_disk_that_refuses_leaves_no_index(texts: Path, tmp_path: Path) -> None:
    base = ("--source", "text", "--input", texts, "--out", tmp_path / "set", "--tokenizer", "bytes")
    assert prepare(*base) == 0
    failed = command(*base, "--force", file_bytes=200_000)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert "cannot be written" in failed.stderr and str(tmp_path / "set") in failed.stderr
    left = {path.name for path in (tmp_path / "set").iterdir()}
    assert "index.json" not in left and "text-train-00000.tar" not in left
    assert not any(name.endswith(".tmp") for name in left)
    # With room again the same command, without --force, goes on.
    assert command(*base).returncode == 0


def test_wrong_arguments_are_refused(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "none.txt").write_text("")
    out = ("--out", tmp_path / "set")
    read = ("--source", "text", "--input", texts, *out)
    for arguments, expected in (
        (("--source", "text", *out), "needs at least one file or folder"),
        (("--source", "python-stdlib", "--field", "x", *out), "belong to --source text"),
        ((*read, "--vocabulary", 257), "--vocabulary 257: too small"),
        ((*read, "--vocabulary", 999, "--tokenizer", "bytes"), "brings its own; drop one"),
        ((*read, "--tokenizer", tmp_path / "absent.json"), "absent.json: cannot be read (No such file"),
        ((*read, "--validation-share", 1), "validation_share: must be less than 1"),
        ((*read, "--shard-mb", 0), "shard_mb: must be greater than or equal to 0.001"),
        (("--source", "text", "--input", texts, "--out", tmp_path / "file"), "is a file"),
        (("inspect", tmp_path), "index.json: cannot be read (No such file"),
    ):
        assert expected in refuse(capsys, *arguments)
    assert not (tmp_path / "set").exists()
    empty = refuse(capsys, "--source", "text", "--input", tmp_path / "none.txt", *out)
    assert "source 'text': nothing to train on, as none of 1 documents was kept; removed 1 empty" in empty
    assert not (tmp_path / "set" / "index.json").exists()


def test_inspect_finds_damage(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    assert prepare("--source", "text", "--input", texts, "--out", out, "--tokenizer", "bytes") == 0
    path = out / "text-train-00000.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 4
    path.write_bytes(content)
    assert f"{path}: sha256 is" in refuse(capsys, "inspect", out)


def test_help_teaches() -> None:
    shown = command("--help")
    assert shown.returncode == 0 and "examples:" in shown.stdout and "python-stdlib --out" in shown.stdout
    wrong = command("--source", "nowhere", "--out", "x")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
