"""Prefetching of shards: a thread fetches those that a run will need before it needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from kabrn_dist.data.index import Shard
from kabrn_dist.data.shard_set import ShardSet
from kabrn_dist.utils.errors import UserError

# Sequences to look ahead from the position of the run, and sequences after which to look again.
LOOKAHEAD, STRIDE = 4096, 512


class Prefetcher:
    """Thread that fetches, in the order of first need, the shards of the next 4096 sequences.

    Args:
        upcoming: `upcoming(position, count)` yields the shards that the `count` sequences from a position on read.
        limit: Most bytes to fetch in advance, so that the cache never drops a shard that is needed sooner.
    """

    def __init__(self, upcoming: Callable[[int, int], Iterable[tuple[ShardSet, Shard]]], limit: float) -> None:
        self._upcoming, self._limit = upcoming, limit
        self._position: int | None = None
        self._last_position = -STRIDE
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def advance(self, position: int) -> None:
        """Report the position of the run. The first call starts the thread."""
        with self._wake:
            self._position = position
            self._wake.notify()
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread after its current shard, without waiting for it."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._is_due())
                if self._closed:
                    return
                assert self._position is not None
                position = self._last_position = self._position
            try:
                self._fetch_from(position)
            except UserError:
                # Ignored here; reading the shard raises the same error.
                continue

    def _is_due(self) -> bool:
        return self._position is not None and abs(self._position - self._last_position) >= STRIDE

    def _fetch_from(self, position: int) -> None:
        total, fetched = 0, set()
        for shards, shard in self._upcoming(position, LOOKAHEAD):
            if (id(shards), shard.name) in fetched:
                continue
            fetched.add((id(shards), shard.name))
            total += shard.bytes
            if total > self._limit or self._closed:
                return
            shards.prefetch(shard)
