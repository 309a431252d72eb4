"""Background saves: snapshots in host memory, and the thread that writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

import torch
from pydantic import JsonValue
from torch import Tensor

from kabrn_dist.checkpoint.fragment import Fragment, check_fragment


@dataclass(frozen=True)
class Snapshot:
    """Contents of one save on one rank.

    Attributes:
        fragments: Fragments that the rank holds.
        state: The caller's JSON.
        error: What kept this rank from copying them, to be raised by the save, where all ranks fail together.
    """

    fragments: Iterable[Fragment]
    state: Mapping[str, JsonValue]
    error: Exception | None = None


class HostBuffers:
    """Host memory for copies of what one rank owns, reused from save to save.

    It takes as many bytes as the rank owns. For tensors on a GPU the buffers are pinned, which the copy needs to run
    at the speed of the bus; torch allocates pinned memory in powers of two, so up to twice as much there.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int, int, torch.dtype], Tensor] = {}

    def copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Return the same fragments with copied values, which training no longer changes.

        Fragments that are not owned come back empty. The copies are valid until the next call.

        Raises:
            UserError: for a fragment outside its tensor.
            RuntimeError: if memory runs out. All buffers are freed.
        """
        try:
            return self._copy(list(fragments))
        except BaseException:
            self._buffers.clear()
            raise

    def _copy(self, fragments: list[Fragment]) -> list[Fragment]:
        for fragment in fragments:
            check_fragment(fragment)
        owned = {_key(fragment): fragment for fragment in fragments if fragment.owned and fragment.values.numel()}
        # Buffers that no longer fit are freed first: old and new ones together would double the memory.
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in owned}
        for key, fragment in owned.items():
            values = fragment.values
            if key not in self._buffers:
                self._buffers[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[key].copy_(values.detach(), non_blocking=True)
        if any(fragment.values.is_cuda for fragment in owned.values()):
            torch.cuda.current_stream().synchronize()
        return [_with_values(fragment, self._buffers.get(_key(fragment))) for fragment in fragments]


class PendingSave:
    """A save that a thread of its own is writing; see `CheckpointStore.save_async`.

    Attributes:
        retrieved: True once `result` has been called: then the store accepts the next save.
    """

    def __init__(self, save: Callable[[], bool]) -> None:
        self.retrieved = False
        self._future: Future[bool] = Future()
        # A daemon: a rank that exits with an error must not wait for ranks that will never answer it.
        Thread(target=self._run, args=(save,), name="checkpoint", daemon=True).start()

    def done(self) -> bool:
        """Return whether this rank's part has ended. Never blocks; ranks may differ."""
        return self._future.done()

    def result(self) -> bool:
        """Wait for the save and return what `CheckpointStore.save` would have: the same on all ranks.

        Raises:
            RuntimeError: if the process group broke because a rank died.
        """
        self.retrieved = True
        return self._future.result()

    def _run(self, save: Callable[[], bool]) -> None:
        try:
            self._future.set_result(save())
        except BaseException as error:
            self._future.set_exception(error)


def _key(fragment: Fragment) -> tuple[str, int, int, torch.dtype]:
    return fragment.name, fragment.offset, fragment.values.numel(), fragment.values.dtype


def _with_values(fragment: Fragment, values: Tensor | None) -> Fragment:
    if values is None or not fragment.owned:
        values = torch.empty(0, dtype=fragment.values.dtype)
        return Fragment(fragment.name, fragment.shape, fragment.offset, values, owned=False)
    return Fragment(fragment.name, fragment.shape, fragment.offset, values, owned=True)
