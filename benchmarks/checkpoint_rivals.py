"""What the checkpoints are measured against: a plain copy, and torch.distributed.checkpoint."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from kabrn_dist.checkpoint.fragment import Fragment

CHUNK_BYTES = 16 * 2**20


def plain_copy(file: Path, tensors: list[Tensor]) -> None:
    """The bytes of the tensors one after another, on the disk when it returns."""
    with open(file, "wb", buffering=0) as stream:
        for values in tensors:
            view = values.view(torch.uint8).numpy().data
            for start in range(0, len(view), CHUNK_BYTES):
                stream.write(view[start : start + CHUNK_BYTES])
        os.fsync(stream.fileno())


def plain_read(file: Path, tensors: list[Tensor]) -> None:
    """The same bytes back into the tensors."""
    with open(file, "rb", buffering=0) as stream:
        for values in tensors:
            view = values.view(torch.uint8).numpy().data
            for start in range(0, len(view), CHUNK_BYTES):
                stream.readinto(view[start : start + CHUNK_BYTES])


class Distributed:
    """torch.distributed.checkpoint on this rank's tensors, each a half of a DTensor."""

    def __init__(self, fragments: list[Fragment], background: dist.ProcessGroup, folder: Path) -> None:
        self._folder, self._background = folder, background
        # That it is alone where it is told to be, and that it overwrites.
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        # As many bytes as a rank owns, in tensors of the same sizes; DTensors are cut evenly.
        rows = {f.name: f.shape[0] // mesh.size() for f in fragments}
        self._state: dict[str, Any] = {
            name: DTensor.from_local(torch.rand(count), mesh, [Shard(0)], run_check=False)
            for name, count in rows.items()
        }
        self._whole = {name: count * mesh.size() for name, count in rows.items()}

    def save(self) -> None:
        """Whole and synced; a second time over the first."""
        dcp.save(self._state, storage_writer=dcp.FileSystemWriter(self._folder / "two", overwrite=True))

    def save_async(self) -> Any:
        """In the background, over a group of its own; a future."""
        writer = dcp.FileSystemWriter(self._folder / "two", overwrite=True)
        return dcp.async_save(self._state, storage_writer=writer, process_group=self._background)

    def load(self, name: str = "two") -> None:
        """On both ranks, in place."""
        dcp.load(self._state, storage_reader=dcp.FileSystemReader(self._folder / name))

    def save_whole(self, fragments: list[Fragment]) -> None:
        """By one rank alone."""
        state = {f.name: f.values[: self._whole[f.name]] for f in fragments}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(self._folder / "one", overwrite=True), no_dist=True)

    def load_whole(self) -> None:
        """What two ranks saved, by one."""
        state = {name: torch.empty(count) for name, count in self._whole.items()}
        dcp.load(state, storage_reader=dcp.FileSystemReader(self._folder / "two"), no_dist=True)
