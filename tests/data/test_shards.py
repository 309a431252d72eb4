"""Shards, their index and the stream read from them: agreement with slow ways, and every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.inspect import inspect_shards
from kabrn_dist.data.index import Index
from kabrn_dist.data.index_checks import check_shard_files
from kabrn_dist.data.index_io import index_fingerprint, read_index
from kabrn_dist.data.open_files import OpenFiles
from kabrn_dist.data.shard_set import FolderSet, open_shard_folder
from kabrn_dist.data.token_stream import TokenStream, mask_naive, stream_naive
from kabrn_dist.data.tokenizer import load_folder_tokenizer
from kabrn_dist.data.verify import verify_shards
from kabrn_dist.utils.errors import UserError
from tests.support.shard_sets import DOCUMENT, Texts, make_set


def make_folder(folder: Path, vocabulary: int = 257, masked: bool = False) -> Index:
    """Random documents: about 450,000 training tokens in 8 blocks and 4 shards, and a small second source."""
    return make_set(
        folder,
        Texts("random", train=100, validation=3, sizes=(1, 9000), per_shard=29, masked=masked),
        Texts("more", train=5, validation=0, masked=not masked),
        vocabulary=vocabulary,
    )


def open_stream(folder: Path, source: str = "random") -> TokenStream:
    shards = open_shard_folder(folder)
    return TokenStream([(shards, shards.index.source(source))], "train")


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
        fields["fingerprint"] = index_fingerprint(Index.model_validate_json(json.dumps(fields)))
    (folder / "index.json").write_text(json.dumps(fields))


def refusal(call: object, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)  # type: ignore[operator]
    return str(caught.value)


def ranges_of(index: Index, total: int) -> list[tuple[int, int]]:
    """The whole, nothing, and around the edges of blocks."""
    shards = index.sources[0].train.shards
    edges = np.cumsum([0, *(tokens for shard in shards for _, tokens, _ in shard.blocks)]).tolist()
    ranges = [(0, total), (0, 0), (total, total), (total - 1, total), (3, 200_001)]
    return ranges + [(max(0, e - 1), min(e + n, total)) for e in edges for n in (0, 1, 7, 8, 9)]


@pytest.mark.parametrize(("vocabulary", "masked"), [(257, True), (70_000, False)])
def test_stream_agrees_with_unpacking(tmp_path: Path, vocabulary: int, masked: bool) -> None:
    folder = tmp_path / "set"
    index = make_folder(folder, vocabulary, masked)
    assert index == read_index(folder)
    source = index.sources[0]
    assert len(source.train.shards) > 2 and len(source.train.shards[0].blocks) > 1
    whole = stream_naive(folder, index, "train", "random")
    stream = open_stream(folder)
    assert len(stream) == len(whole) == source.train.tokens
    for start, stop in ranges_of(index, len(whole)):
        read = stream.read(start, stop)
        assert read.dtype == np.int64 and np.array_equal(read, whole[start:stop]), (start, stop)
    if masked:
        mask = mask_naive(folder, index, "train", "random")
        assert len(mask) == len(whole) and mask.sum() == source.train.loss_tokens < source.train.tokens
        for start, stop in ranges_of(index, len(whole)):
            read = stream.read_rows(np.array([start]), stop - start)[1]
            assert read is not None and np.array_equal(read[0], mask[start:stop]), (start, stop)
    stream.close()
    assert np.array_equal(stream.read(5, 9), whole[5:9])
    for start, stop in ((-1, 3), (5, 4), (0, len(whole) + 1)):
        with pytest.raises(IndexError):
            stream.read(start, stop)


@pytest.mark.parametrize("length", [1, 7, 900, 70_000])
def test_many_rows_of_all_sources_agree_with_unpacking(folder: Path, length: int) -> None:
    shards = open_shard_folder(folder)
    index = shards.index
    stream = TokenStream([(shards, source) for source in index.sources], "train")
    whole = stream_naive(folder, index, "train")
    masks = [
        mask_naive(folder, index, "train", source.name) if source.masked else np.ones(source.train.tokens, bool)
        for source in index.sources
    ]
    mask = np.concatenate(masks)
    assert stream.edges.tolist() == [0, len(masks[0]), len(whole)] and not mask.all()
    last = len(whole) - length
    starts = np.array([last, 0, *np.random.default_rng(0).integers(0, last, 30), 0])
    tokens, loss = stream.read_rows(starts, length)
    assert loss is not None and tokens.dtype == stream.dtype
    for row, start in enumerate(starts.tolist()):
        assert np.array_equal(tokens[row], whole[start : start + length])
        assert np.array_equal(loss[row], mask[start : start + length])
    assert stream.read_rows(starts[:0], length)[0].shape == (0, length)
    for start in (-1, last + 1):
        with pytest.raises(IndexError):
            stream.read_rows(np.array([0, start]), length)


def test_the_shards_of_a_range_are_known_without_reading(folder: Path) -> None:
    index, stream = read_index(folder), open_stream(folder)
    shards = index.sources[0].train.shards
    edges = np.cumsum([0, *(shard.tokens for shard in shards)])
    starts = np.array([0, edges[1] - 1, edges[1] - 5, edges[1], 0])
    stops = np.array([1, edges[1], edges[1] + 1, edges[2], edges[-1]])
    wanted = [shards[:1], shards[:1], shards[:2], shards[1:2], shards]
    found = [tuple(shard for _, shard in each) for each in stream.list_shards(starts, stops)]
    assert found == wanted


def test_totals_add_up_over_the_sources(folder: Path) -> None:
    index = read_index(folder)
    for split in ("train", "validation"):
        parts = [source.split(split) for source in index.sources]
        assert index.tokens(split) == sum(part.tokens for part in parts) == len(stream_naive(folder, index, split))
        assert index.documents(split) == sum(part.documents for part in parts)
        assert index.text_bytes(split) == sum(part.text_bytes for part in parts) and index.gzip9_bytes(split) == 0
    assert "unknown source 'x'; use one of random, more" in refusal(index.source, "x")


def test_plain_webdataset_reads_the_shards(folder: Path) -> None:
    index = read_index(folder)
    paths = [str(folder / shard.name) for shard in index.sources[0].train.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert all(set(sample) >= {"tok", "len"} for sample in samples)
    read = np.concatenate([np.frombuffer(sample["tok"], "<u2") for sample in samples])
    assert np.array_equal(read, stream_naive(folder, index, "train", "random"))
    assert sum(len(sample["len"]) // 4 for sample in samples) == index.sources[0].train.documents


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    index = make_set(folder, Texts("random", train=70, validation=0, sizes=(50, 51), per_shard=1))
    files = OpenFiles(limit=64)
    stream = TokenStream([(FolderSet(folder, index), index.sources[0])], "train", files)
    for document in [*range(70), 0]:
        assert stream.read(50 * document, 50 * document + 1).tolist() == [DOCUMENT]
    assert len(files) == 64
    assert len(TokenStream([(FolderSet(folder, index), index.sources[0])], "validation")) == 0


def test_whole_set_verifies(folder: Path) -> None:
    index = read_index(folder)
    read: list[int] = []
    verify_shards(folder, index, read.append)
    assert sum(read) == sum(shard.bytes for shard in index.shards())


def test_damaged_shards_are_found(folder: Path) -> None:
    index = read_index(folder)
    path = folder / index.sources[0].train.shards[1].name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    check_shard_files(folder, index)
    message = refusal(verify_shards, folder, index)
    assert str(path) in message and "sha256" in message and "copy this shard again" in message
    path.write_bytes(whole[:-1000])
    message = refusal(check_shard_files, folder, index)
    assert f"{len(whole) - 1000} bytes, the index says {len(whole)}" in message and str(path) in message
    path.unlink()
    assert f"{path}: No such file" in refusal(check_shard_files, folder, index)


def test_reading_a_bad_block_names_shard_and_block(folder: Path) -> None:
    index = read_index(folder)
    stream = open_stream(folder)
    path = folder / index.sources[0].train.shards[0].name
    offset, _, _ = index.sources[0].train.shards[0].blocks[1]
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
    offset, tokens, _ = index.sources[0].train.shards[0].blocks[0]
    rewrite(folder, {"sources.0.train.shards.0.blocks.0": [offset - 512, tokens, 0]})
    assert "block 0 is not at byte" in refusal(verify_shards, folder, read_index(folder))
    rewrite(folder, {"sources.0.train.shards.0.blocks.0": [offset, tokens, 0], "document_token": 7})
    assert "document token is not exactly at the start" in refusal(verify_shards, folder, read_index(folder))


def test_verify_reads_the_masks(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    make_folder(folder, masked=True)
    verify_shards(folder, read_index(folder))
    used = read_index(folder).sources[0].train.loss_tokens
    rewrite(folder, {"sources.0.train.loss_tokens": used - 1})
    assert f"{used} tokens of source random count" in refusal(verify_shards, folder, read_index(folder))
    offset, tokens, mask = read_index(folder).sources[0].train.shards[0].blocks[0]
    rewrite(folder, {"sources.0.train.shards.0.blocks.0": [offset, tokens, mask + 1]})
    assert "block 0: no loss mask at byte" in refusal(verify_shards, folder, read_index(folder))
    rewrite(folder, {"sources.0.train.shards.0.blocks.0": [offset, tokens, offset - 1]})
    assert "lies outside the block" in refusal(read_index, folder)


def test_inspect_shows_every_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_shards(folder, 2)
    shown, index = capsys.readouterr().out, read_index(folder)
    # Documents are any bytes here: a terminal must not obey them.
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    assert "source random (random), weight 1\n" in shown
    assert "source more (random), weight 1, loss on part of each document" in shown
    assert shown.count("--- train document") == 4 and "--- train document 1 of more" in shown
    assert f"{index.sources[1].train.loss_tokens:,}" in shown and f"fingerprint {index.fingerprint}" in shown
    assert f"all sources: {index.tokens('train'):,} + {index.tokens('validation'):,} tokens" in shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocabulary": 258}, "tokenizer.json: the index says vocabulary 258, its tokenizer has 257"),
        ({"vocabulary": 60_000}, "the index says vocabulary 60000, its tokenizer has 257"),
        ({"document_token": 0}, "the index says document_token 0, its tokenizer has 256"),
        ({"tokenizer.kind": "bpe"}, "the index says tokenizer.kind bpe, its tokenizer has bytes"),
        ({"sources.0.epochs": 1e308}, "random.epochs is 1e+308, not above 0 and at most 1e+06"),
        ({"sources.0.weight": 1e308}, "random.weight is 1e+308, not above 0 and at most 1e+12"),
        ({"sources.0.train.text_bytes": -1}, "random.train.text_bytes is -1, which is no size"),
        ({"sources.0.validation.gzip9_bytes": -1}, "random.validation.gzip9_bytes is -1, which is no size"),
        ({"sources.0.train.shards.0.bytes": -5}, "bytes is -5, which is no size"),
        ({"sources.0.train.shards.0.documents": -5}, "documents is -5, which is no size"),
    ],
)
def test_an_index_that_was_resealed_by_hand_is_refused_at_the_start(
    changes: dict[str, object], words: str, folder: Path
) -> None:
    rewrite(folder, changes)
    assert words in refusal(lambda: open_shard_folder(folder).tokenizer())


def test_bad_indexes_are_refused(folder: Path) -> None:
    path = folder / "index.json"
    whole = path.read_text()
    cases: list[tuple[dict[str, object], str]] = [
        ({"format": 1}, "format: Input should be 2, found '1'; prepare the data again"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"vocabulary": "many"}, "vocabulary: Input should be a valid integer, found 'many'"),
        ({"sources.0.train.shards.0.name": "../elsewhere.tar"}, "'../elsewhere.tar' is not a plain file name"),
        ({"sources.0.train.shards.0.name": "/etc/x.tar"}, "not a plain file name"),
        ({"sources.0.train.shards.0.name": "random-train-00001.tar"}, "two shards have the same name"),
        ({"sources.0.train.shards.0.blocks.0": [2**50, 5, 0]}, "which cannot be"),
        ({"sources.0.train.shards.0.blocks.0": [-512, 5, 0]}, "which cannot be"),
        ({"sources.0.train.shards.0.blocks.0": [1024, 2**40, 0]}, "which cannot be"),
        ({"sources.0.train.shards.0.tokens": 1}, "do not add up to its 1 tokens"),
        ({"sources.0.train.tokens": 1}, "random.train.tokens is 1"),
        ({"sources.0.validation.documents": 1}, "random.validation.documents is 1"),
        ({"document_token": 257}, "document_token is 257"),
        ({"dtype": "uint32"}, "dtype is 'uint32'"),
        ({"sources.0.name": "more"}, "two sources have the same name"),
        ({"sources.0.name": "../x"}, "source name '../x'"),
        ({"sources.0.weight": -1.0}, "random.weight is -1.0"),
        ({"sources.1.epochs": 0.0}, "more.epochs is 0.0"),
        ({"sources.0.train.shards.0.sha256": "../../x"}, "sha256 '../../x' is not a sha256"),
        ({"sources.0.train.loss_tokens": 5}, "random.train.loss_tokens is 5 of"),
        ({"sources.0.masked": True}, "its loss mask at byte 0 lies outside the block"),
        ({"sources.1.masked": False}, "has a loss mask, its source has none"),
        ({"sources": []}, "sources is empty"),
        ({"sources.0.kind": "other"}, "fingerprint is"),
    ]
    for change, expected in cases:
        path.write_text(whole)
        rewrite(folder, change, seal=False)
        message = refusal(read_index, folder)
        assert expected in message and str(path) in message and "\n" not in message, message
        assert "again" in message
    for text, expected in (
        (whole[:100], "not JSON"),
        ("", "not JSON"),
        ("{}", "dtype: Field required"),
        ('{"format": 1}', "found '1'"),
    ):
        path.write_text(text)
        assert expected in refusal(read_index, folder)
    path.unlink()
    assert "writes the index last" in refusal(read_index, folder)


def test_another_tokenizer_and_another_split_are_refused(folder: Path) -> None:
    index = read_index(folder)
    assert load_folder_tokenizer(folder, index).kind == "bytes"
    (folder / "tokenizer.json").write_text('{"kind":  "bytes"}')
    assert "not the tokenizer that made the shards" in refusal(load_folder_tokenizer, folder, index)
    (folder / "tokenizer.json").unlink()
    assert "No such file" in refusal(load_folder_tokenizer, folder, index)
    assert "unknown split 'test'" in refusal(index.sources[0].split, "test")
