"""Shards behind a URL: the same batches as from the folder, through a cache that holds what it should."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kabrn_dist.config import DataConfig
from kabrn_dist.data import prefetch, remote
from kabrn_dist.data.corpus import Corpus, open_corpus
from kabrn_dist.data.dataset import Batch, TokenDataset
from kabrn_dist.data.index import Index
from kabrn_dist.data.remote import RemoteSet, open_shard_set
from kabrn_dist.utils.errors import UserError
from tests.support.runs import ROOT
from tests.support.shard_sets import Texts, make_set
from tests.support.web import Web, serve

LENGTH = 64


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    folder = tmp_path_factory.mktemp("remote") / "set"
    texts = Texts("web", train=60, sizes=(4000, 9000)), Texts("math", train=20, validation=2, masked=True)
    return folder, make_set(folder, *texts)


@pytest.fixture
def web(index: tuple[Path, Index]) -> Iterator[Web]:
    with serve(index[0]) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_RETRY_AFTER_SECONDS", (0.01, 0.02))


def data(path: str, cache: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"path": path, "sequence_length": LENGTH, "cache_dir": cache, **more})


def total(index: Index) -> int:
    return sum(shard.bytes for shard in index.shards())


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def until(done: Callable[[], bool]) -> None:
    """Wait for what a thread is about to do; a minute is for a busy machine."""
    deadline = time.monotonic() + 60
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done()


def settle(web: Web) -> None:
    """Until nothing more is asked for, as far as one can see."""
    count = -1
    while count != len(web.responses):
        count = len(web.responses)
        time.sleep(0.3)


def test_batches_are_those_of_the_folder_and_each_shard_comes_once(
    index: tuple[Path, Index], web: Web, tmp_path: Path
) -> None:
    folder, whole = index
    for _ in range(2):
        here = open_corpus(data(str(folder), tmp_path))
        there = open_corpus(data(f"{web.url}/", tmp_path / "cache"))
        assert there.tokenizer().sha256 == here.tokenizer().sha256 and there.is_remote and not here.is_remote
        for split, ordered in (("train", True), ("validation", False)):
            near, far = (TokenDataset(corpus, split, LENGTH, 3, ordered) for corpus in (here, there))  # type: ignore[arg-type]
            positions = range(min(700, near.num_sequences))
            assert equal(near.get(positions), far.get(positions))
            far.close()
    assert web.sent() == total(whole), "each shard once, and a second session none"
    files = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    assert {path.name for path in files} == {shard.sha256 for shard in whole.shards()}


def test_shards_come_before_they_are_needed(index: tuple[Path, Index], web: Web, tmp_path: Path) -> None:
    batches = TokenDataset(open_corpus(data(web.url, tmp_path)), "train", LENGTH, 3)
    batches.get([0])
    shards = [shard for source in index[1].sources for shard in source.train.shards]
    # 4,096 sequences ahead are all of this set.
    until(lambda: web.sent() == sum(shard.bytes for shard in shards))
    until(lambda: not any(tmp_path.glob("*.part")))
    batches.get(range(1500))
    assert web.sent() == sum(shard.bytes for shard in shards)
    batches.close()


def test_what_is_fetched_ahead_leaves_room_for_what_is_read(
    index: tuple[Path, Index], web: Web, tmp_path: Path
) -> None:
    limit = 3.2 * max(shard.bytes for shard in index[1].shards())
    batches = TokenDataset(open_corpus(data(web.url, tmp_path, cache_size_gb=limit / 1e9)), "train", LENGTH, 3)
    batches.get([0])
    settle(web)
    fetched = {name for name, *_ in web.responses if name.endswith(".tar")}
    assert 1 <= len(fetched) < 6 and web.sent() <= limit
    batches.close()


def test_the_cache_is_bounded_and_drops_the_oldest(index: tuple[Path, Index], web: Web, tmp_path: Path) -> None:
    folder, whole = index
    limit = int(2.5 * max(shard.bytes for shard in whole.shards()))
    stranger = tmp_path / "thesis.doc"
    stranger.write_bytes(b"x" * 10 * limit)
    shards = RemoteSet(web.url, tmp_path, limit)
    wanted = list(whole.sources[0].train.shards)
    for shard in wanted[:2]:
        assert shards.locate(shard).read_bytes() == (folder / shard.name).read_bytes()
    os.utime(shards.locate(wanted[1]), (1, 1))
    shards.locate(wanted[2])
    kept = {path.name for path in tmp_path.iterdir() if len(path.name) == 64}
    assert kept == {wanted[0].sha256, wanted[2].sha256} and stranger.exists()
    near, far = (open_corpus(data(path, tmp_path, cache_size_gb=limit / 1e9)) for path in (str(folder), web.url))
    ours, theirs = (TokenDataset(corpus, "train", LENGTH, 3) for corpus in (near, far))
    assert equal(ours.get(range(40)), theirs.get(range(40)))
    theirs.close()
    settle(web)
    assert sum(path.stat().st_size for path in tmp_path.iterdir() if len(path.name) >= 64) <= limit
    with pytest.raises(
        UserError, match=r"data.cache_size_gb .*too small for a single shard.*set data.cache_size_gb to"
    ):
        RemoteSet(web.url, tmp_path, limit // 3)


CHILD = """
import sys
from pathlib import Path
from kabrn_dist.data.remote import RemoteSet, open_shard_set
shards = RemoteSet(sys.argv[1], Path(sys.argv[2]), 10**9)
for shard in shards.index.sources[0].train.shards:
    shards.locate(shard)
"""


def child(web: Web, cache: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, web.url, str(cache)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_part_is_completed_from_where_it_stands(
    index: tuple[Path, Index], web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 20_000)
    shard = index[1].sources[0].train.shards[0]
    files = remote.RemoteFiles(web.url)
    # As a killed process leaves it, and as another one takes it up.
    shards = RemoteSet(web.url, tmp_path, 10**9)
    part = tmp_path / f"{shard.sha256}.{shard.bytes}.part"
    part.write_bytes((index[0] / shard.name).read_bytes()[:50_000])
    assert shards.locate(shard).read_bytes() == (index[0] / shard.name).read_bytes()
    assert min(first for name, first, _ in web.responses if name == shard.name) == 50_000 and not part.exists()
    # Servers without ranges send all of it, which still does.
    web.ranges = False
    part.write_bytes((index[0] / shard.name).read_bytes()[:50_000])
    files.download(shard, part)
    assert part.read_bytes() == (index[0] / shard.name).read_bytes()


def test_a_killed_process_leaves_nothing_that_looks_whole(index: tuple[Path, Index], web: Web, tmp_path: Path) -> None:
    web.pause = 0.2
    process = child(web, tmp_path)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    web.pause = 0.0
    # Two at once: one fetches a shard, the other waits for it.
    both = [child(web, tmp_path) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    wanted = index[1].sources[0].train.shards
    for shard in wanted:
        assert (tmp_path / shard.sha256).read_bytes() == (index[0] / shard.name).read_bytes()
    assert not any(tmp_path.glob("*.part"))
    times = {shard.name: sum(name == shard.name for name, *_ in web.responses) for shard in wanted}
    assert sorted(times.values())[-1] <= 2 and sum(times.values()) <= len(wanted) + 1, "the killed one's comes again"


def test_bad_servers_are_named(index: tuple[Path, Index], web: Web, tmp_path: Path) -> None:
    shards = RemoteSet(web.url, tmp_path, 10**9)
    first, second, *_ = index[1].sources[0].train.shards
    web.spoil[first.name] = 1
    assert shards.locate(first).read_bytes() == (index[0] / first.name).read_bytes(), "once wrong may pass"
    web.spoil[second.name] = 2
    with pytest.raises(UserError, match=rf"{web.url}/{second.name}: came twice with sha256 .*upload this shard again"):
        shards.locate(second)
    assert not (tmp_path / second.sha256).exists()
    web.fail[second.name] = 2
    assert shards.locate(second).exists(), "a server that is busy twice is asked a third time"
    (tmp_path / second.sha256).unlink()
    web.fail[second.name] = 3
    with pytest.raises(UserError, match=rf"{second.name}: .*503.*in 3 tries; check the network"):
        shards.locate(second)
    web.folder = tmp_path
    with pytest.raises(UserError, match=rf"{second.name}: no such file; check the URL"):
        shards.locate(second)
    with pytest.raises(UserError, match=r"index.json: no such file"):
        RemoteSet(web.url, tmp_path, 10**9)


def test_another_file_system_does_as_well(index: tuple[Path, Index], tmp_path: Path) -> None:
    folder, whole = index
    shards = open_shard_set(f"file://{folder}", tmp_path / "cache", 1.0)
    assert shards.index == whole and shards.is_remote and shards.tokenizer().kind == "bytes"
    for shard in list(whole.shards())[:2]:
        assert shards.locate(shard).read_bytes() == (folder / shard.name).read_bytes()
        assert shards.locate(shard) == tmp_path / "cache" / shard.sha256


def test_a_cache_that_is_too_small_is_said_but_does(
    index: tuple[Path, Index], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit = total(index[1]) - 1
    open_shard_set(f"file://{index[0]}", tmp_path, (limit + 1) / 1e9)
    assert not caplog.text
    open_shard_set(f"file://{index[0]}", tmp_path, limit / 1e9)
    assert "shards will be downloaded again and again" in caplog.text


def test_other_bad_urls_are_refused(index: tuple[Path, Index], web: Web, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nonsense:// cannot be read here"):
        open_shard_set("nonsense://bucket/set", tmp_path, 1.0)
    with pytest.raises(UserError, match=r"127.0.0.1:9/index.json: .*in 3 tries"):
        open_corpus(data("http://127.0.0.1:9", tmp_path))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir .*file"):
        open_corpus(data(web.url, file / "cache"))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "index.json").write_bytes((index[0] / "index.json").read_bytes())
    (copy / "tokenizer.json").write_bytes(b'{"kind":  "bytes"}')
    web.folder = copy
    with pytest.raises(UserError, match=rf"{web.url}/tokenizer.json: .*not the tokenizer that made the shards"):
        open_corpus(data(web.url, tmp_path)).tokenizer()
    (copy / "index.json").write_text((index[0] / "index.json").read_text().replace('"random"', '"changed"', 1))
    with pytest.raises(UserError, match=rf"{web.url}/index.json: fingerprint is"):
        open_corpus(data(web.url, tmp_path))


def test_a_full_disk_is_said(index: tuple[Path, Index], web: Web, tmp_path: Path) -> None:
    shards, shard = RemoteSet(web.url, tmp_path, 10**9), next(index[1].shards())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shard.bytes // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"data.cache_dir .*File too large.*lower data.cache_size_gb"):
            shards.locate(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / shard.sha256).exists()
    assert shards.locate(shard).read_bytes() == (index[0] / shard.name).read_bytes()


def test_the_thread_ahead_follows_and_ends(index: tuple[Path, Index]) -> None:
    looks: list[int] = []

    def upcoming(position: int, count: int) -> Iterator[tuple[Corpus, object]]:
        looks.append(position)
        yield from ()

    thread = prefetch.Prefetcher(upcoming, 1e9)  # type: ignore[arg-type]
    thread.advance(0)
    until(lambda: looks == [0])
    for position in (1, prefetch.STRIDE - 1, prefetch.STRIDE):
        thread.advance(position)
    until(lambda: looks == [0, prefetch.STRIDE])
    # A run that went back looks from there.
    thread.advance(5)
    thread.advance(0)
    until(lambda: looks == [0, prefetch.STRIDE, 0])
    thread.close()
    assert thread._thread is not None
    thread._thread.join(5)
    assert not thread._thread.is_alive()
