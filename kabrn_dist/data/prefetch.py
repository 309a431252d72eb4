"""Fetches the shards that a run will need before it needs them, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from kabrn_dist.data.index import Shard
from kabrn_dist.data.shard_set import ShardSet
from kabrn_dist.utils.errors import UserError

# Sequences looked ahead from where the run stands; a look is repeated after so many more.
LOOKAHEAD, STRIDE = 4096, 512


class Prefetcher:
    """A thread that fetches, in the order of first need, what the next 4096 sequences read.

    `upcoming(position, count)` names the shards of `count` sequences from a position on. It fetches no more than
    `limit` bytes of them, so that the cache never drops what is needed sooner.
    """

    def __init__(self, upcoming: Callable[[int, int], Iterable[tuple[ShardSet, Shard]]], limit: float) -> None:
        self._upcoming, self._limit = upcoming, limit
        self._position: int | None = None
        self._looked = -STRIDE
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def advance(self, position: int) -> None:
        """The run has come to `position`. The first call starts the thread."""
        with self._wake:
            self._position = position
            self._wake.notify()
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._work, name="shards ahead", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread after the shard that it is at; does not wait for it."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._far_enough())
                if self._closed:
                    return
                assert self._position is not None
                position = self._looked = self._position
            try:
                self._look(position)
            except UserError:
                # The run meets the same error where it needs the shard, and says so; until then there is hope.
                continue

    def _far_enough(self) -> bool:
        return self._position is not None and abs(self._position - self._looked) >= STRIDE

    def _look(self, position: int) -> None:
        total, seen = 0, set()
        for shards, shard in self._upcoming(position, LOOKAHEAD):
            if (id(shards), shard.name) in seen:
                continue
            seen.add((id(shards), shard.name))
            total += shard.bytes
            if total > self._limit or self._closed:
                return
            shards.prefetch(shard)
