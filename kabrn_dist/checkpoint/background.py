"""A save beside the training: copies in host memory, and the thread that writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Thread

import torch
from torch import Tensor

from kabrn_dist.checkpoint.fragment import Fragment, check_fragment


class HostBuffers:
    """Copies of what one rank owns, in buffers that are kept from save to save.

    Host memory: as many bytes as the rank owns. On cards the buffers are pinned, which the copy needs to run at
    the bus's speed; torch takes pinned memory in powers of two, so up to twice as much there.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int, int, torch.dtype], Tensor] = {}

    def copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The same fragments with values that training no longer changes; those not owned come back empty.

        The copies hold until the next call. Raises UserError for a fragment outside its tensor, RuntimeError
        where memory runs out; all buffers are given back then.
        """
        try:
            return self._copy(list(fragments))
        except BaseException:
            self._buffers.clear()
            raise

    def _copy(self, fragments: list[Fragment]) -> list[Fragment]:
        for fragment in fragments:
            check_fragment(fragment)
        owned = [fragment for fragment in fragments if fragment.owned and fragment.values.numel()]
        wanted = {_key(fragment): fragment for fragment in owned}
        # What no longer fits goes first: old and new buffers together would double the memory.
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in wanted}
        for key, fragment in wanted.items():
            if key not in self._buffers:
                values = fragment.values
                self._buffers[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[key].copy_(fragment.values.detach(), non_blocking=True)
        if any(fragment.values.is_cuda for fragment in owned):
            torch.cuda.current_stream().synchronize()
        return [_with_values(fragment, self._buffers.get(_key(fragment))) for fragment in fragments]


class Background:
    """`work()` in a thread of its own, started at once."""

    def __init__(self, work: Callable[[], bool]) -> None:
        self._work = work
        self._result = False
        self._error: BaseException | None = None
        # A daemon, as a rank that ends with an error must not wait for others that will never answer it.
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        """Never blocks."""
        return not self._thread.is_alive()

    def wait(self) -> bool:
        """The outcome of the work, or the exception that ended it, raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error


def _key(fragment: Fragment) -> tuple[str, int, int, torch.dtype]:
    return fragment.name, fragment.offset, fragment.values.numel(), fragment.values.dtype


def _with_values(fragment: Fragment, copy: Tensor | None) -> Fragment:
    if copy is None or not fragment.owned:
        copy = torch.empty(0, dtype=fragment.values.dtype)
        return Fragment(fragment.name, fragment.shape, fragment.offset, copy, owned=False)
    return Fragment(fragment.name, fragment.shape, fragment.offset, copy, owned=True)
