"""Shards are hashed while they are read, once on a machine, and few of them are open at a time."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from kabrn_dist.data import verified_record
from kabrn_dist.data.corpus import Corpus, open_folder_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.data.open_files import OpenFiles
from kabrn_dist.data.shard_verifier import OpenedShard, ShardVerifier
from kabrn_dist.data.verified_record import VerifiedRecord, identify
from kabrn_dist.utils.errors import UserError
from tests.support.shard_sets import Texts, make_set


def open_dataset(folder: Path, files: OpenFiles) -> TokenDataset:
    corpus = open_folder_corpus(folder)
    return TokenDataset(Corpus(corpus.sets, corpus.sources, files=files), "train", 16, seed=1)


def verifier_with(folder: Path) -> ShardVerifier:
    return ShardVerifier(VerifiedRecord(folder))


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [zero, flip_one_bit])
def test_a_damaged_shard_is_named_soon_after_it_is_opened(damage: object, tmp_path: Path) -> None:
    index = make_set(tmp_path / "set", Texts("a"))
    shard = index.sources[0].train.shards[1]
    damage(tmp_path / "set" / shard.name)  # type: ignore[operator]
    verifier = verifier_with(tmp_path / "record")
    dataset = open_dataset(tmp_path / "set", OpenFiles(verifier))
    dataset.get(range(dataset.num_sequences))
    with pytest.raises(UserError, match=f"{shard.name}: its sha256 is .* is damaged; find every bad shard with"):
        verifier.wait()
    assert not verifier.is_pending()
    with pytest.raises(UserError, match=shard.name):
        dataset.get([0])


def test_what_was_verified_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified_record, "RESOLUTION_SECONDS", -60.0)
    shard = make_set(tmp_path / "set", Texts("a")).sources[0].train.shards[0]
    path = tmp_path / "set" / shard.name
    first = verifier_with(tmp_path / "record")
    first.add(OpenedShard(path, shard, False))
    first.wait()
    record = VerifiedRecord(tmp_path / "record")
    assert record.holds(path, identify(path), shard.sha256)
    assert not record.holds(path, identify(path), "0" * 64)
    # The same size and time of change, as `cp -p` leaves them: only the inode's own time tells.
    status = path.stat()
    flip_one_bit(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not record.holds(path, identify(path), shard.sha256)
    first.add(OpenedShard(path, shard, False))
    with pytest.raises(UserError, match="damaged"):
        first.wait()
    assert not VerifiedRecord(tmp_path / "record").holds(path, identify(path), shard.sha256)


def test_a_record_that_a_crash_cut_off_skips_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified_record, "RESOLUTION_SECONDS", -60.0)
    (tmp_path / "file").write_bytes(b"content")
    identity = identify(tmp_path / "file")
    VerifiedRecord(tmp_path / "record").add(tmp_path / "file", identity, "a" * 64, time.time())
    (file,) = (tmp_path / "record").iterdir()
    whole = file.read_bytes()
    for length in range(len(whole) - 1):
        file.write_bytes(whole[:length])
        assert not VerifiedRecord(tmp_path / "record").holds(tmp_path / "file", identity, "a" * 64)
    file.write_bytes(whole[: len(whole) // 2])
    record = VerifiedRecord(tmp_path / "record")
    record.add(tmp_path / "file", identity, "a" * 64, time.time())
    assert record.holds(tmp_path / "file", identity, "a" * 64)
    file.write_bytes(b"junk\n[]\n{}\nnull\n\xff\n")
    assert not VerifiedRecord(tmp_path / "record").holds(tmp_path / "file", identity, "a" * 64)


def test_a_file_that_has_just_been_written_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    record = VerifiedRecord(tmp_path / "record")
    record.add(tmp_path / "file", identify(tmp_path / "file"), "a" * 64, time.time())
    assert not record.holds(tmp_path / "file", identify(tmp_path / "file"), "a" * 64)


def test_where_no_record_can_be_kept_every_process_hashes(tmp_path: Path) -> None:
    (tmp_path / "record").write_text("a file where the folder should be")
    shard = make_set(tmp_path / "set", Texts("a")).sources[0].train.shards[0]
    verifier = verifier_with(tmp_path / "record")
    verifier.add(OpenedShard(tmp_path / "set" / shard.name, shard, False))
    verifier.wait()


def count_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_many_shards_of_many_sources_need_few_open_files(tmp_path: Path) -> None:
    """Whether the limit is read from the system, or turns out to be too high."""
    make_set(tmp_path / "set", *(Texts(f"s{n}", 4, 0, sizes=(20, 40), per_shard=1) for n in range(24)))
    expected = open_dataset(tmp_path / "set", OpenFiles(limit=10_000))
    rows = range(expected.num_sequences)
    tokens = expected.get(rows).tokens
    expected.close()
    allowed, (soft, hard) = count_open_files() + 40, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    try:
        for limit in (None, 100_000):
            files = OpenFiles(verifier_with(tmp_path / "record"), limit)
            dataset = open_dataset(tmp_path / "set", files)
            assert np.array_equal(dataset.get(rows).tokens, tokens)
            assert 1 < len(files) <= (allowed // 4 if limit is None else 40)
            dataset.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_room_for_a_single_file_is_not_blamed_on_the_shard(tmp_path: Path) -> None:
    make_set(tmp_path / "set", Texts("a"))
    dataset = open_dataset(tmp_path / "set", OpenFiles())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(UserError, match=r"no room for another open file \(ulimit -n 3\); raise it"):
            dataset.get([0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
