"""States of conversations, so that a turn costs only its new tokens."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def _encode_ids(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()


class StateCache:
    """The least recently used go first. Threads may share it.

    A state is found by all the tokens that it has read, never by a hash of them: whoever gets it has sent these very
    tokens.

    Args:
        limit_bytes: Memory for states and their tokens.
        limit_states: Largest number of states.
    """

    def __init__(self, limit_bytes: int, limit_states: int) -> None:
        self._limit_bytes, self._limit_states = limit_bytes, limit_states
        self._states: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, ids: Sequence[int]) -> tuple[int, bytes]:
        """Return the state that has read most of the first tokens, and no others.

        Args:
            ids: The tokens.

        Returns:
            How many it has read, and the state; (0, b"") without any.
        """
        wanted, best = _encode_ids(ids), b""
        with self._lock:
            for key in self._states:
                if len(best) < len(key) <= len(wanted) and wanted.startswith(key):
                    best = key
            if not best:
                return 0, b""
            self._states.move_to_end(best)
            return len(best) // array("I").itemsize, self._states[best]

    def store(self, ids: Sequence[int], state: bytes) -> None:
        """Keep the state that has read `ids`, unless it is larger than the whole memory.

        Args:
            ids: Its tokens.
            state: The state.
        """
        key = _encode_ids(ids)
        size = len(key) + len(state)
        if size > self._limit_bytes or not key:
            return
        with self._lock:
            self._drop(key)
            self._states[key] = state
            self._bytes += size
            while self._bytes > self._limit_bytes or len(self._states) > self._limit_states:
                self._drop(next(iter(self._states)))

    def usage(self) -> tuple[int, int]:
        """Return the number of states, and the bytes of memory that they take."""
        with self._lock:
            return len(self._states), self._bytes

    def _drop(self, key: bytes) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self._bytes -= len(key) + len(state)
