"""What the preparation keeps, drops and orders: duplicates, masks, interleaved texts, splits, bad input."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_prep.__main__ import main
from data_prep.read import SourceReader
from data_prep.tokens import loss_mask_naive
from kabrn_dist.data.corpus import open_folder_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.data.index import SPLITS
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.token_stream import stream_naive
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN

NO_CLEANING = {"unicode": "off", "control": False, "broken": "refuse", "tag": False, "quality": "off"}
NO_CLEANING |= {"repetition": "off", "exact": False, "near": False}


def prepare(folder: Path, sources: list[dict[str, Any]], *flags: str, **settings: Any) -> int:
    """Write a recipe and run it into `folder`/set."""
    tree = {"out": str(folder / "set"), "root": str(folder), "tokenizer": {"bytes": True}, "clean": NO_CLEANING}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree | {"sources": sources} | settings))
    return main(["--recipe", str(folder / "recipe.yaml"), *flags])


def documents(folder: Path, source: str) -> Iterator[tuple[str, str]]:
    """(split, text) of all documents of a source, in the order of the shards."""
    shards = open_shard_folder(folder / "set")
    tokenizer = shards.tokenizer()
    for split in SPLITS:
        stream = stream_naive(folder / "set", shards.index, split, source)
        for ids in np.split(stream, np.flatnonzero(stream == shards.index.document_token))[1:]:
            yield split, b"".join(tokenizer.token_bytes(id) for id in ids[1:].tolist()).decode()


def texts_of(folder: Path, source: str) -> list[str]:
    return [text for _, text in documents(folder, source)]


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path.name


def report_of(folder: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((folder / "set" / "report.json").read_text())
    return {source["name"]: source for source in report["sources"]}


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def words(seed: int, count: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(f"w{number}" for number in random.integers(0, 5000, count))


def test_without_cleaning_documents_come_back_byte_for_byte(tmp_path: Path) -> None:
    texts = [
        "a\r\nb\r\n",
        "\ufeffwith a mark",
        "nul \x00 and \x1b",
        "e\u0301 ﬁ 😀",
        f"{DOCUMENT_TOKEN} as text",
        "twice",
        "twice",
    ]
    name = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert prepare(tmp_path, [{"name": "a", "kind": "jsonl", "input": name}]) == 0
    assert sorted(texts_of(tmp_path, "a")) == sorted(texts)


def test_duplicates_go_once_over_all_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared, long = "the very same text", words(1, 300)
    nearly = long + " one word more"
    first = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in (shared, long, *(words(n, 60) for n in range(9)))])
    second = write_lines(tmp_path / "b.jsonl", [{"text": t} for t in (nearly, shared, "own", *map(str, range(9)))])
    sources = [{"name": "a", "kind": "jsonl", "input": first}, {"name": "b", "kind": "jsonl", "input": second}]
    assert (
        prepare(tmp_path, sources, clean=NO_CLEANING | {"exact": True, "near": True, "near_numbers": "distinct"}) == 0
    )
    assert "b: dropped 1 documents that equal another, 1 nearly\n" in capsys.readouterr().out
    a, b = texts_of(tmp_path, "a"), texts_of(tmp_path, "b")
    assert shared in a and long in a and len(a) == 11
    assert "own" in b and shared not in b and nearly not in b
    found = report_of(tmp_path)
    assert (found["a"]["exact_duplicates"], found["b"]["exact_duplicates"]) == (0, 1)
    assert (found["a"]["near_duplicates"], found["b"]["near_duplicates"]) == (0, 1)
    same, alike = found["b"]["removed_samples"]["same text"], found["b"]["removed_samples"]["nearly the same"]
    assert [text for _, text, _ in same] == [shared] and [text for _, text, _ in alike] == [nearly[:200]]
    assert all(name.startswith("b.jsonl byte") and kept.startswith("as a.jsonl byte") for name, _, kept in same + alike)


def test_evaluation_sets_are_kept_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = words(7, 40)
    write_lines(tmp_path / "test.jsonl", [{"question": question}])
    records = [{"text": f"before {question} after"}, *({"text": words(n, 50)} for n in range(10, 16))]
    name = write_lines(tmp_path / "a.jsonl", records)
    clean = NO_CLEANING | {"contamination": {"paths": ["test.jsonl"]}}
    assert prepare(tmp_path, [{"name": "a", "kind": "jsonl", "input": name}], clean=clean) == 0
    # One text is divided between the splits.
    assert len(texts_of(tmp_path, "a")) == 6 + 1
    source = report_of(tmp_path)["a"]
    assert source["removed"] == {"contamination": 1} and "test.jsonl" in json.dumps(source["removed_samples"])
    write_lines(tmp_path / "test.jsonl", [{"question": words(8, 40)}])
    capsys.readouterr()
    code = prepare(tmp_path, [{"name": "a", "kind": "jsonl", "input": name}], clean=clean)
    assert "sources that have changed since" in refused(capsys, code)


def test_parallel_texts_follow_one_another(tmp_path: Path) -> None:
    english = [{"id": str(n), "text": f"english {n}"} for n in range(40)]
    german = [{"id": str(n), "text": f"deutsch {n}"} for n in reversed(range(40))]
    sources = [
        {"name": name, "kind": "jsonl", "input": write_lines(tmp_path / f"{name}.jsonl", lines)}
        | {"options": {"key": "id"}, "interleave": "pairs"}
        for name, lines in (("en", english), ("de", german))
    ]
    assert prepare(tmp_path, sources, validation_share=0.2) == 0
    found = list(documents(tmp_path, "pairs"))
    assert len(found) == 80 and {split for split, _ in found} == set(SPLITS)
    for (split, first), (other, second) in zip(found[::2], found[1::2], strict=True):
        assert split == other and second == first.replace("english", "deutsch") and first.startswith("english")


def test_interleaving_needs_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_lines(tmp_path / "a.jsonl", [{"text": "no key"}])
    code = prepare(tmp_path, [{"name": "a", "kind": "jsonl", "input": name, "interleave": "pairs"}])
    assert "has no key" in refused(capsys, code)


def test_the_loss_counts_on_answers_only(tmp_path: Path) -> None:
    records = [{"question": f"how much is {n} + {n}, dé?", "answer": f"{2 * n} 😀\n#### {2 * n}"} for n in range(60)]
    write_lines(tmp_path / "train.jsonl", records)
    source = {"name": "qa", "kind": "openqa", "input": "train.jsonl", "options": {"loss": "answer"}}
    assert prepare(tmp_path, [source]) == 0
    shards = open_shard_folder(tmp_path / "set")
    tokenizer, length = shards.tokenizer(), 64
    batches = TokenDataset(open_folder_corpus(tmp_path / "set"), "train", length, seed=0, ordered=False)
    stream = stream_naive(tmp_path / "set", shards.index, "train")
    use: list[bool] = []
    for ids in np.split(stream, np.flatnonzero(stream == shards.index.document_token))[1:]:
        text = tokenizer.decode(ids[1:].tolist())
        start = text.index("Answer:") + len("Answer:")
        use += loss_mask_naive(tokenizer, ids[1:].tolist(), text, [(start, len(text))])
    assert 0.2 < np.mean(use) < 0.8 and shards.index.sources[0].train.loss_tokens == sum(use)
    targets = np.where(use, stream, -100)
    rows = batches.get(range(batches.num_sequences)).targets
    np.testing.assert_array_equal(rows.numpy().ravel(), targets[1 : 1 + rows.numel()])


def test_splits_and_documents_larger_than_blocks_and_shards(tmp_path: Path) -> None:
    name = write_lines(tmp_path / "a.jsonl", [{"text": "small"}, {"text": "x" * 300_000}, {"text": "y" * 5}])
    one = write_lines(tmp_path / "b.jsonl", [{"text": "the only one"}])
    sources = [{"name": "a", "kind": "jsonl", "input": name}, {"name": "b", "kind": "jsonl", "input": one}]
    assert prepare(tmp_path, sources, validation_share=0.01, shard_mb=0.05) == 0
    index = open_shard_folder(tmp_path / "set").index
    assert index.source("a").validation.documents == 1 and index.source("a").train.documents == 3
    assert index.source("b").train.documents == 1 and index.source("b").validation.documents == 0
    assert sorted(map(len, texts_of(tmp_path, "a"))) == [5, 5, 3_000, 297_000]
    assert main(["inspect", str(tmp_path / "set")]) == 0


def test_unreadable_files_are_counted_and_too_many_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(199):
        (tmp_path / "texts" / f"{n}.txt").write_text(words(n, 20))
    (tmp_path / "texts" / "binary.txt").write_bytes(b"\x7fELF\x00\x01" * 50)
    (tmp_path / "texts" / "cut.txt.gz").write_bytes(gzip.compress(words(0, 200).encode())[:-20])
    (tmp_path / "texts" / "lost.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "texts" / "pipe.txt")
    source = [{"name": "a", "kind": "text", "input": "texts"}]
    clean = NO_CLEANING | {"broken": "drop"}
    assert prepare(tmp_path, source, clean=clean, max_unreadable=0.04) == 0
    found = report_of(tmp_path)["a"]
    names = [name.partition(":")[0] for name in found["unreadable_names"]]
    expected = ["texts/binary.txt", "texts/cut.txt.gz", "texts/lost.txt", "texts/pipe.txt"]
    assert found["unreadable"] == 4 and names == expected
    assert len(texts_of(tmp_path, "a")) == 199 and found["documents"] == 203
    capsys.readouterr()
    code = prepare(tmp_path, source, "--force", clean=clean, max_unreadable=0.01)
    assert "4 of 203 documents cannot be read (first: texts/binary.txt" in refused(capsys, code)
    assert not (tmp_path / "set" / "index.json").exists()


@pytest.mark.parametrize("change", ["grows", "shrinks", "is replaced"])
def test_sources_that_change_while_they_are_read_are_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = [{"name": "a", "kind": "jsonl", "input": write_lines(tmp_path / "a.jsonl", [{"text": "x"}] * 9)}]
    read = SourceReader.read

    def read_while_written(reader: SourceReader, *arguments: Any) -> None:
        path = tmp_path / "a.jsonl"
        if change == "is replaced":
            os.replace(shutil.copy(path, tmp_path / "new"), path)
        else:
            os.truncate(path, path.stat().st_size // 2) if change == "shrinks" else path.write_text("{}\n" * 99)
        read(reader, *arguments)

    monkeypatch.setattr(SourceReader, "read", read_while_written)
    said = refused(capsys, prepare(tmp_path, source, max_unreadable=1.0))
    assert said.endswith("wait until nothing writes to them, and add --force to start over\n"), said
    assert not (tmp_path / "set" / "index.json").exists()
    monkeypatch.undo()
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}] * 9)
    assert prepare(tmp_path, source, "--force") == 0


def test_bad_recipes_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    good = {"name": "a", "kind": "jsonl", "input": name}
    for sources, settings, expected in (
        ([good | {"weight": 0}], {}, "sources.0.weight: must be greater than 0"),
        ([good | {"weight": float("nan")}], {}, "sources.0.weight: must be a finite number, found nan"),
        ([good | {"epochs": 0}], {}, "sources.0.epochs: must be greater than 0, found 0\n"),
        ([good | {"colour": 1}], {}, "unknown key 'sources.0.colour'"),
        ([good, good], {}, "two sources are called 'a'"),
        ([good | {"kind": "poems"}], {}, "no such kind"),
        ([good | {"options": {"colour": 1}}], {}, "no option 'colour'"),
        ([good | {"input": "absent.jsonl"}], {}, "no such file or folder"),
        ([good], {"validation_share": 2}, "validation_share"),
        ([good], {"clean": {"near_numbers": "odd"}}, "near_numbers"),
        ([good], {"tokenizer": {"train": 100}}, "too small"),
    ):
        assert expected in refused(capsys, prepare(tmp_path, sources, **settings))
    assert not (tmp_path / "set" / "index.json").exists()


def test_dry_run_and_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_lines(tmp_path / "a.jsonl", [{"text": str(n)} for n in range(5)])
    assert prepare(tmp_path, [{"name": "a", "kind": "jsonl", "input": name}], "--dry-run") == 0
    assert "5 documents" in capsys.readouterr().out and not (tmp_path / "set").exists()
    flags = ("--set", "sources.a.weight=3", "--set", "validation_share=0")
    assert prepare(tmp_path, [{"name": "a", "kind": "jsonl", "input": name}], *flags) == 0
    index = open_shard_folder(tmp_path / "set").index
    assert index.sources[0].weight == 3 and index.documents("validation") == 0
