"""Files in which growing keeps tensors, on a disk without room for them."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch

from kabrn_dist.grow.tensors import ScratchTensors
from kabrn_dist.utils.errors import UserError


def test_a_tensor_that_the_disk_has_no_room_for_is_refused_before_it_is_mapped(tmp_path: Path) -> None:
    store = ScratchTensors(tmp_path / "scratch")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=r"scratch/1: cannot be written \(File too large\); make room"):
            store.empty((100, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(store.empty((3, 2)), torch.zeros(3, 2)) and store.empty((0, 4)).shape == (0, 4)
    file = next(path for path in store.folder.iterdir() if path.stat().st_size == 24)
    # The room is taken at once: a file with holes would fail when it is written to, where nothing can be said.
    assert file.stat().st_blocks > 0
