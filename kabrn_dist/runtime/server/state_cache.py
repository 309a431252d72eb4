"""States of conversations, so that a turn costs only its new tokens."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

_OWNER_BYTES = 8


def _make_key(owner: int, ids: Sequence[int]) -> bytes:
    return owner.to_bytes(_OWNER_BYTES, "little") + array("I", ids).tobytes()


class StateCache:
    """The least recently used go first. Threads may share it.

    A state is found by all the tokens that it has read, never by a hash of them: whoever gets it has sent these very
    tokens. It belongs to an owner, a model with certain adapters, whose number nothing else ever has.

    Args:
        limit_bytes: Memory for states and their tokens.
        limit_states: Largest number of states.
    """

    def __init__(self, limit_bytes: int, limit_states: int) -> None:
        self._limit_bytes, self._limit_states = limit_bytes, limit_states
        self._states: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, owner: int, ids: Sequence[int]) -> tuple[int, bytes]:
        """Return the state that has read most of the first tokens, and no others.

        Args:
            owner: Number of the owner.
            ids: The tokens.

        Returns:
            How many it has read, and the state; (0, b"") without any.
        """
        wanted, best = _make_key(owner, ids), b""
        with self._lock:
            for key in self._states:
                if len(best) < len(key) <= len(wanted) and wanted.startswith(key):
                    best = key
            if not best:
                return 0, b""
            self._states.move_to_end(best)
            return (len(best) - _OWNER_BYTES) // array("I").itemsize, self._states[best]

    def store(self, owner: int, ids: Sequence[int], state: bytes) -> None:
        """Keep the state that has read `ids`, unless it is larger than the whole memory.

        Args:
            owner: Number of the owner.
            ids: Its tokens.
            state: The state.
        """
        key = _make_key(owner, ids)
        size = len(key) + len(state)
        if size > self._limit_bytes or not len(ids):
            return
        with self._lock:
            self._drop(key)
            self._states[key] = state
            self._bytes += size
            while self._bytes > self._limit_bytes or len(self._states) > self._limit_states:
                self._drop(next(iter(self._states)))

    def forget(self, owner: int) -> None:
        """Drop all states of an owner."""
        first = _make_key(owner, ())
        with self._lock:
            for key in [key for key in self._states if key.startswith(first)]:
                self._drop(key)

    def usage(self) -> tuple[int, int]:
        """Return the number of states, and the bytes of memory that they take."""
        with self._lock:
            return len(self._states), self._bytes

    def _drop(self, key: bytes) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self._bytes -= len(key) + len(state)
