"""Shards, their index and the stream read from them: agreement with slow ways, and every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.shards import write_shards
from kabrn_dist.data.index import (
    Index,
    Source,
    Split,
    TokenizerInfo,
    check_shards,
    dtype_for,
    fingerprint,
    read_index,
    write_index,
)
from kabrn_dist.data.tokenizer import Tokenizer, load_tokenizer
from kabrn_dist.data.tokens import TokenStream, stream_naive
from kabrn_dist.data.verify import verify_shards
from kabrn_dist.errors import UserError

DOCUMENT = 256


def make_folder(folder: Path, vocabulary: int = 257, sizes: tuple[int, int] = (1, 9000)) -> Index:
    """Random documents: about 450,000 training tokens in 7 blocks and 4 shards."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    tokenizer = Tokenizer.of_bytes()
    tokenizer.save(folder / "tokenizer.json")
    dtype = dtype_for(vocabulary)

    def split(name: str, count: int) -> Split:
        documents = [random.integers(0, vocabulary, random.integers(*sizes)) for _ in range(count)]
        for document in documents:
            document[document == DOCUMENT] = 0
            document[0] = DOCUMENT
        shards = write_shards(folder, name, documents, dtype, shard_bytes=100_000 * np.dtype(dtype).itemsize)
        tokens = sum(map(len, documents))
        return Split(shards=shards, documents=count, tokens=tokens, text_bytes=tokens - count)

    index = Index(
        dtype=dtype,
        vocabulary=vocabulary,
        document_token=DOCUMENT,
        tokenizer=TokenizerInfo(kind="bytes", sha256=tokenizer.sha256),
        source=Source(name="random", options={}),
        train=split("train", 100),
        validation=split("validation", 3),
    )
    return write_index(folder, index)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path / "set")
    return tmp_path / "set"


def rewrite(folder: Path, change: dict[str, object], seal: bool = True) -> None:
    """Change keys of index.json (dotted, numbers index lists) as someone with an editor would."""
    fields = json.loads((folder / "index.json").read_text())
    for key, value in change.items():
        at, parts = fields, key.split(".")
        for part in parts[:-1]:
            at = at[int(part)] if isinstance(at, list) else at[part]
        at[int(parts[-1]) if isinstance(at, list) else parts[-1]] = value
    if seal:
        fields["fingerprint"] = fingerprint(Index.model_validate_json(json.dumps(fields)))
    (folder / "index.json").write_text(json.dumps(fields))


def refusal(call: object, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)  # type: ignore[operator]
    return str(caught.value)


@pytest.mark.parametrize("vocabulary", [257, 70_000])
def test_stream_agrees_with_unpacking(tmp_path: Path, vocabulary: int) -> None:
    index = make_folder(tmp_path / "set", vocabulary)
    assert index == read_index(tmp_path / "set")
    assert len(index.train.shards) > 2 and len(index.train.shards[0].blocks) == 2
    whole = stream_naive(tmp_path / "set", index, "train")
    stream = TokenStream(tmp_path / "set", index, "train")
    assert len(stream) == len(whole) == index.train.tokens
    assert whole.max() == vocabulary - 1 or vocabulary > 257
    edges = np.cumsum([0, *(tokens for shard in index.train.shards for _, tokens in shard.blocks)]).tolist()
    ranges = [(0, len(whole)), (0, 0), (len(whole), len(whole)), (len(whole) - 1, len(whole)), (3, 200_001)]
    ranges += [(max(0, e - 1), min(e + 1, len(whole))) for e in edges] + [(e, min(e + 7, len(whole))) for e in edges]
    for start, stop in ranges:
        read = stream.read(start, stop)
        assert read.dtype == np.int64 and np.array_equal(read, whole[start:stop]), (start, stop)
    stream.close()
    assert np.array_equal(stream.read(5, 9), whole[5:9])
    for start, stop in ((-1, 3), (5, 4), (0, len(whole) + 1)):
        with pytest.raises(IndexError):
            stream.read(start, stop)


def test_plain_webdataset_reads_the_shards(folder: Path) -> None:
    index = read_index(folder)
    paths = [str(folder / shard.name) for shard in index.train.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert all(set(sample) >= {"tok", "len"} for sample in samples)
    read = np.concatenate([np.frombuffer(sample["tok"], "<u2") for sample in samples])
    assert np.array_equal(read, stream_naive(folder, index, "train"))
    assert sum(len(sample["len"]) // 4 for sample in samples) == index.train.documents


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    documents = [np.full(1 << 16, DOCUMENT)] * 70
    shards = write_shards(folder, "train", documents, "uint16", shard_bytes=1)
    split = Split(shards=shards, documents=70, tokens=70 << 16, text_bytes=0)
    none = Split(shards=(), documents=0, tokens=0, text_bytes=0)
    info = TokenizerInfo(kind="bytes", sha256="")
    index = Index(
        dtype="uint16",
        vocabulary=257,
        document_token=DOCUMENT,
        tokenizer=info,
        source=Source(name="x", options={}),
        train=split,
        validation=none,
    )
    stream = TokenStream(folder, index, "train")
    for block in [*range(70), 0]:
        assert stream.read(block << 16, (block << 16) + 3).tolist() == [DOCUMENT] * 3
    assert len(stream._files) <= 64
    assert len(TokenStream(folder, index, "validation")) == 0


def test_whole_set_verifies(folder: Path) -> None:
    index = read_index(folder)
    read: list[int] = []
    verify_shards(folder, index, read.append)
    assert sum(read) == sum(shard.bytes for shard in (*index.train.shards, *index.validation.shards))


def test_damaged_shards_are_found(folder: Path) -> None:
    index = read_index(folder)
    path = folder / index.train.shards[1].name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    check_shards(folder, index)
    message = refusal(verify_shards, folder, index)
    assert str(path) in message and "sha256" in message and "Copy this shard again" in message
    path.write_bytes(whole[:-1000])
    message = refusal(check_shards, folder, index)
    assert f"{len(whole) - 1000} bytes, the index says {len(whole)}" in message and str(path) in message
    path.unlink()
    assert f"{path}: No such file" in refusal(check_shards, folder, index)


def test_reading_a_bad_block_names_shard_and_block(folder: Path) -> None:
    index = read_index(folder)
    stream = TokenStream(folder, index, "train")
    path = folder / index.train.shards[0].name
    offset, _ = index.train.shards[0].blocks[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: offset + 10])
    message = refusal(stream.read, 0, 100_000)
    assert f"{path} block 000001" in message and "bytes instead of" in message and "inspect" in message
    path.write_bytes(whole[:offset] + b"\xff\xff" + whole[offset + 2 :])
    assert "token 65535 in a vocabulary of 257" in refusal(stream.read, 0, 100_000)
    path.write_bytes(whole)
    assert len(stream.read(0, 100_000)) == 100_000
    stream.close()
    path.unlink()
    assert "No such file" in refusal(stream.read, 0, 5)


def test_verify_finds_an_index_that_does_not_fit_its_shards(folder: Path) -> None:
    index = read_index(folder)
    offset, tokens = index.train.shards[0].blocks[0]
    rewrite(folder, {"train.shards.0.blocks.0": [offset - 512, tokens]})
    assert "block 0 is not at byte" in refusal(verify_shards, folder, read_index(folder))
    rewrite(folder, {"train.shards.0.blocks.0": [offset, tokens], "document_token": 7})
    assert "document token is not exactly at the start" in refusal(verify_shards, folder, read_index(folder))


def test_bad_indexes_are_refused(folder: Path) -> None:
    path = folder / "index.json"
    whole = path.read_text()
    cases: list[tuple[dict[str, object], str]] = [
        ({"format": 2}, "format: Input should be 1, found '2'"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"vocabulary": "many"}, "vocabulary: Input should be a valid integer, found 'many'"),
        ({"train.shards.0.name": "../elsewhere.tar"}, "'../elsewhere.tar' is not a plain file name"),
        ({"train.shards.0.name": "/etc/x.tar"}, "not a plain file name"),
        ({"train.shards.0.name": "train-00001.tar"}, "two shards have the same name"),
        ({"train.shards.0.blocks.0": [2**50, 5]}, "which cannot be"),
        ({"train.shards.0.blocks.0": [-512, 5]}, "which cannot be"),
        ({"train.shards.0.blocks.0": [1024, 2**40]}, "which cannot be"),
        ({"train.shards.0.tokens": 1}, "do not add up to its 1 tokens"),
        ({"train.tokens": 1}, "train.tokens is 1"),
        ({"validation.documents": 1}, "validation.documents is 1"),
        ({"document_token": 257}, "document_token is 257"),
        ({"dtype": "uint32"}, "dtype is 'uint32'"),
        ({"source.name": "other"}, "fingerprint is"),
    ]
    for change, expected in cases:
        path.write_text(whole)
        rewrite(folder, change, seal=False)
        message = refusal(read_index, folder)
        assert expected in message and str(path) in message and "\n" not in message, message
        assert "again" in message
    for text, expected in ((whole[:100], "not JSON"), ("", "not JSON"), ("{}", "dtype: Field required")):
        path.write_text(text)
        assert expected in refusal(read_index, folder)
    path.unlink()
    assert "writes the index last" in refusal(read_index, folder)


def test_another_tokenizer_and_another_split_are_refused(folder: Path) -> None:
    index = read_index(folder)
    assert load_tokenizer(folder, index).kind == "bytes"
    (folder / "tokenizer.json").write_text('{"kind":  "bytes"}')
    assert "not the tokenizer that made the shards" in refusal(load_tokenizer, folder, index)
    (folder / "tokenizer.json").unlink()
    assert "No such file" in refusal(load_tokenizer, folder, index)
    assert "there is no 'test'" in refusal(index.split, "test")
