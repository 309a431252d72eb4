"""Shards are the same however they are divided into pieces, and after a run that ended among these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep import pieces
from data_prep.__main__ import main
from data_prep.encode import ShardBuilder
from data_prep.pieces import EncodedDocument, ShardPiece, divide_shards, read_piece, write_piece
from data_prep.progress import StageProgress
from data_prep.shards import TokenizedDocument
from data_prep.streams import ShardTask
from tests.data_prep.test_pipeline import NO_CLEANING, words, write_lines

END = 1 << 64


def test_pieces_cover_their_shards() -> None:
    tasks = [
        ShardTask(0, "train", 0, 5, END // 3, 10_000_001),
        ShardTask(0, "train", 1, END // 3, END, 6_000_000),
        ShardTask(1, "train", 0, 0, 7, 1),
    ]
    divided = divide_shards(tasks)
    assert [len(parts) for parts in divided] == [5, 3, 1]
    for number, (task, parts) in enumerate(zip(tasks, divided, strict=True)):
        assert [part.low for part in parts[1:]] == [part.high for part in parts[:-1]]
        assert (parts[0].low, parts[-1].high) == (task.low, task.high)
        assert all((part.shard, part.task) == (number, task) for part in parts)
    # Of a large preparation there are only so many, as each looks into all runs.
    many = [task._replace(bytes=task.bytes * 10_000) for task in tasks]
    assert pieces.PIECES <= sum(map(len, divide_shards(many))) <= pieces.PIECES + len(tasks)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_piece_comes_back(tmp_path: Path, dtype: str) -> None:
    documents = [
        EncodedDocument(TokenizedDocument(np.arange(300, dtype=dtype), np.arange(300) % 3 == 0), 1000),
        EncodedDocument(TokenizedDocument(np.array([7], dtype)), 0),
        EncodedDocument(TokenizedDocument(np.arange(5, dtype=dtype)), 9),
    ]
    write_piece(tmp_path / "piece", documents)
    found = list(read_piece(tmp_path / "piece", np.dtype(dtype)))
    for before, after in zip(documents, found, strict=True):
        assert before.text_bytes == after.text_bytes and np.array_equal(before.document.tokens, after.document.tokens)
        assert after.document.tokens.dtype == dtype
        mask, its = before.document.loss_mask, after.document.loss_mask
        assert (mask is None and its is None) or np.array_equal(mask, its)  # type: ignore[arg-type]
    write_piece(tmp_path / "none", [])
    assert not list(read_piece(tmp_path / "none", np.dtype(dtype)))


def make_recipe(folder: Path) -> Path:
    """Two sources of a few shards each, one of them with loss masks, and a document that is divided."""
    texts = [{"text": words(seed, 40 + seed)} for seed in range(60)]
    questions = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(90)]
    sources = [
        {"name": "texts", "kind": "jsonl", "input": write_lines(folder / "texts.jsonl", texts)},
        {"name": "one", "kind": "jsonl", "input": write_lines(folder / "one.jsonl", [{"text": words(99, 900)}])},
        {
            "name": "qa",
            "kind": "openqa",
            "input": write_lines(folder / "train.jsonl", questions),
            "options": {"loss": "answer"},
        },
    ]
    tree = {"root": str(folder), "tokenizer": {"train": 400}, "clean": NO_CLEANING, "sources": sources}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree | {"shard_mb": 0.02}))
    return folder / "recipe.yaml"


def make_set(recipe: Path, name: str) -> dict[str, bytes]:
    out = recipe.parent / name
    assert main(["--recipe", str(recipe), "--out", str(out)]) == 0
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith("report.")}


def test_shards_do_not_depend_on_their_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path)
    whole = make_set(recipe, "whole")
    assert sum(name.endswith(".tar") for name in whole) > 4
    for size in (100, 5000):
        monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", size)
        assert make_set(recipe, f"of-{size}") == whole


def test_encoded_pieces_are_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path)
    whole = make_set(recipe, "whole")
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 500)
    encode = ShardBuilder.encode
    done: list[ShardPiece] = []
    most = 20

    def encode_some(builder: ShardBuilder, piece: ShardPiece, progress: StageProgress) -> None:
        if len(done) == most:
            raise RuntimeError("enough")
        done.append(piece)
        encode(builder, piece, progress)

    monkeypatch.setattr(ShardBuilder, "encode", encode_some)
    with pytest.raises(RuntimeError, match="enough"):
        make_set(recipe, "stopped")
    first = done.copy()
    done.clear()
    most = len(whole) * 100
    assert make_set(recipe, "stopped") == whole
    assert len(first) == 20 and done and not {*first} & {*done}
