"""How fast are checkpoints saved, loaded and resharded, and how long does a background save stop the training?

Two processes share a state such as AdamW's, fp32: masters and two moments, of which each owns a half, as ZeRO cuts it.
In one run, on one disk, in turns:

- a plain copy: each rank writes its bytes to a file of its own and calls fsync; nothing is hashed, agreed or committed.
  A plain read: each rank reads that file into tensors that exist.
- ours: save, save_async (the stall is its call), load with and without verification, and load on another partition.
- torch.distributed.checkpoint on the same bytes, as DTensors: save with fsync, async_save, load. It hashes nothing.

Files are read from the page cache, where a restart on the same machine finds them, or (cold) after eviction from it.
Times are those of the slowest rank, the least of several rounds. A step is matrix products and an all-reduce; its time
is the median of those beside a save, and of others without one.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.checkpoint_rivals import Distributed, plain_copy, plain_read
from benchmarks.report import Report, run
from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.distributed.launch_env import free_port
from kabrn_dist.utils.malloc import keep_freed_memory

WORLD = 2
PARTS = ("master", "exp_avg", "exp_avg_sq")
PLAIN_COPY, PLAIN_READ, DCP = "plain copy with fsync", "plain read", "torch.distributed.checkpoint"

# By name: seconds of the slowest rank.
Figures = dict[str, float]


def questions(report: Report, quick: bool) -> None:
    """Fill the report: every save and load against its rivals."""
    size, rounds = (64 * 10**6, 2) if quick else (10**9, 5)
    figures = run_processes(size, rounds)
    gigabytes = size / 1e9
    for ours, rivals in (
        ("save", (PLAIN_COPY, f"{DCP} save")),
        ("background save, to its end", (PLAIN_COPY, f"{DCP} async_save, to its end")),
        ("load, verified", (PLAIN_COPY, PLAIN_READ, f"{DCP} load")),
        ("load, not verified", (PLAIN_READ, f"{DCP} load")),
        ("load, verified, cold", (f"{PLAIN_READ}, cold", f"{DCP} load, cold")),
        ("load 2 → 1", (PLAIN_READ, f"{DCP} load 2 → 1")),
        ("load 1 → 2", (PLAIN_READ, f"{DCP} load 1 → 2")),
        ("load on a shifted partition", (PLAIN_READ,)),
    ):
        for rival in rivals:
            speed = f"{gigabytes / figures[ours]:.2f} GB/s"
            name = f"{ours} ({speed}), rival: {rival} ({gigabytes / figures[rival]:.2f} GB/s)"
            report.compare(name, figures[ours], figures[rival], "s")
    report.compare("load on a shifted partition, rival: " + DCP, None, "missing: DTensors are cut evenly", "s")
    for ours, rival in (
        ("stall of a save, the first", "save"),
        ("stall of a save", "save"),
        ("stall of a save", f"{DCP} stall"),
        ("step", "step without a save"),
        ("step", f"{DCP} step"),
    ):
        report.compare(f"{ours}, rival: {rival}", figures[ours] * 1e3, figures[rival] * 1e3, "ms")
    for what in ("save", "load, verified"):
        report.at_least(f"{what}: speed over the plain copy's", figures[PLAIN_COPY] / figures[what], 0.8)
    report.at_most("stall over the synchronous save", figures["stall of a save"] / figures["save"], 0.25)


def run_processes(size: int, rounds: int) -> Figures:
    # Beside the repository's runs: /tmp is memory on many machines, and no disk.
    """Return the figures of all processes, measured on a disk."""
    base = Path(os.environ.get("BENCH_FOLDER", "runs"))
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base, prefix="bench-checkpoint-") as folder:
        arguments = (size, rounds, free_port(), Path(folder))
        multiprocessing.spawn(_rank, arguments, nprocs=WORLD)
        figures: Figures = json.loads((Path(folder) / "figures.json").read_text())
    return figures


def _rank(rank: int, size: int, rounds: int, port: int, folder: Path) -> None:
    """One process."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    figures = Measurement(rank, size, folder).all(rounds)
    if rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def make_fragments(size: int, first: float, last: float, fill: bool = True) -> list[Fragment]:
    """A rank's share [first, last) of a state of `size` bytes in tensors of unlike sizes, cut as ZeRO cuts them."""
    total = size // (4 * len(PARTS))
    ends = [total * i * (i + 1) // (40 * 41) for i in range(41)]
    fragments = []
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        low, high = (min(max(int(total * share), start), stop) for share in (first, last))
        for part in PARTS:
            values = torch.rand(high - low) if fill else torch.full((high - low,), torch.nan)
            fragments.append(Fragment(f"layers.{number}/{part}", (stop - start,), low - start, values, owned=True))
    return fragments


class Measurement:
    """Everything that one rank does and times."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self.mine = make_fragments(size, rank / WORLD, (rank + 1) / WORLD)
        self.solo = [dist.new_group([other]) for other in range(WORLD)][rank]
        background = dist.new_group(backend="gloo")
        self.store = CheckpointStore(folder / "ours", background_group=background)
        self.dcp = Distributed(self.mine, background, folder / "dcp")
        self.figures: Figures = {}
        self.step_number = 0

    def all(self, rounds: int) -> Figures:
        """Return all figures after this many rounds. Collective."""
        self._prepare()
        for _ in range(rounds):
            self._saves()
            self._loads()
        return self.figures

    def _saves(self) -> None:
        values = [fragment.values for fragment in self.mine]
        plain = self.folder / f"plain-{self.rank}"
        self._time(PLAIN_COPY, lambda: plain_copy(plain, values))
        self._time("save", lambda: self._expect(self.store.save(self._next(), self.mine, {})))
        self._time(f"{DCP} save", self.dcp.save)
        self._quietly()
        stall = "stall of a save" if "stall of a save, the first" in self.figures else "stall of a save, the first"
        names = stall, "step", "background save, to its end"
        self._background(names, lambda: self.store.save_async(self._next(), self.mine, {}))
        names = f"{DCP} stall", f"{DCP} step", f"{DCP} async_save, to its end"
        self._background(names, self.dcp.save_async)

    def _loads(self) -> None:
        plain = self.folder / f"plain-{self.rank}"
        values = [fragment.values for fragment in self.mine]
        path = self.folder / "ours" / f"step-{self.step_number:08d}"
        self._time(PLAIN_READ, lambda: plain_read(plain, values))
        self._time("load, not verified", lambda: self.store.load(path, self.mine))
        self._time("load, verified", self._find_and_load)
        self._time(f"{DCP} load", self.dcp.load)
        self._loads_elsewhere(path)
        self._time(f"{PLAIN_READ}, cold", lambda: plain_read(plain, values), evict=True)
        self._time("load, verified, cold", self._find_and_load, evict=True)
        self._time(f"{DCP} load, cold", self.dcp.load, evict=True)

    def _loads_elsewhere(self, path: Path) -> None:
        """On other partitions than the one that was saved."""
        edge = 0.37
        share = (0.0, edge) if self.rank == 0 else (edge, 1.0)
        other = make_fragments(self.size, *share, fill=False)
        self._time("load on a shifted partition", lambda: self.store.load(path, other))
        _check(other)
        one = self.folder / "one" / "step-00000001"
        self._time("load 1 → 2", lambda: self.store.load(one, self.mine))
        self._time(f"{DCP} load 1 → 2", lambda: self.dcp.load("one"))
        whole = make_fragments(self.size, 0.0, 1.0 if self.rank == 0 else 0.0, fill=False)
        alone = CheckpointStore(self.folder / "ours", group=self.solo)
        self._time("load 2 → 1", lambda: alone.load(path, whole) if self.rank == 0 else None)
        _check(whole)
        self._time(f"{DCP} load 2 → 1", lambda: self.dcp.load_whole() if self.rank == 0 else None)

    def _prepare(self) -> None:
        """What one process has saved, to be loaded by two; and older saves, as each one in a run has some to remove."""
        if self.rank == 0:
            whole = make_fragments(self.size, 0.0, 1.0)
            self._expect(CheckpointStore(self.folder / "one", group=self.solo).save(1, whole, {}))
            self.dcp.save_whole(whole)
        for _ in range(self.store.keep_last):
            self._expect(self.store.save(self._next(), self.mine, {}))
        dist.barrier()

    def _background(
        self,
        names: tuple[str, str, str],
        save_async: Callable[[], Any],
    ) -> None:
        """Run training steps during a save, until all ranks' parts have ended."""
        stall, step, whole = names
        dist.barrier()
        began = time.perf_counter()
        pending = save_async()
        self._record(stall, time.perf_counter() - began)
        seconds: list[float] = []
        while not seconds or not _all(pending.done()):
            seconds.append(_train_step())
        self._record(step, statistics.median(seconds))
        # The store's save returns whether it succeeded, that of torch.distributed.checkpoint raises where it did not.
        assert pending.result() is not False, "the disk refused"
        self._record(whole, time.perf_counter() - began)

    def _quietly(self) -> None:
        dist.barrier()
        self._record("step without a save", statistics.median(_train_step() for _ in range(7)))

    def _time(self, name: str, work: Callable[[], object], evict: bool = False) -> None:
        if evict and self.rank == 0:
            _evict(self.folder)
        dist.barrier()
        began = time.perf_counter()
        work()
        self._record(name, time.perf_counter() - began)

    def _record(self, name: str, seconds: float) -> None:
        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        self.figures[name] = min(self.figures.get(name, float("inf")), float(slowest))

    def _find_and_load(self) -> None:
        path = self.store.find_latest()
        assert path is not None
        self.store.load(path, self.mine)

    def _expect(self, saved: bool) -> None:
        assert saved, "the disk refused"

    def _next(self) -> int:
        self.step_number += 1
        return self.step_number


def _train_step() -> float:
    """Seconds of something like a step: it computes, and waits for the others."""
    began = time.perf_counter()
    x = torch.ones(512, 512)
    for _ in range(20):
        x = x @ x / 512
    dist.all_reduce(x)
    return time.perf_counter() - began


def _all(flag: bool) -> bool:
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    return bool(flags)


def _check(fragments: list[Fragment]) -> None:
    assert not any(fragment.values.isnan().any() for fragment in fragments), "a load left values out"


def _evict(folder: Path) -> None:
    """Have the kernel forget the files, so that the next read comes from the disk; not those written only once."""
    for file in folder.rglob("*"):
        if file.is_file() and "one" not in file.parts:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    run("Checkpoints: save, load and reshard, two processes", questions)
