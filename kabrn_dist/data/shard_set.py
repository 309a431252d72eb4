"""A shard set wherever it lies: its index, its tokenizer, and its shards as files of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kabrn_dist.data.index import Index, Shard
from kabrn_dist.data.index_checks import check_shard_files
from kabrn_dist.data.index_io import read_index
from kabrn_dist.data.tokenizer import Tokenizer, load_tokenizer

# Files that a stream keeps open.
_OPEN_FILES = 64


class ShardSet(Protocol):
    """Attributes:
    index: what the set holds.
    where: its folder or URL, for messages.
    open_files: how many shards a reader may keep open.
    is_remote: True where `locate` may have to fetch.
    """

    @property
    def index(self) -> Index: ...
    @property
    def location(self) -> str: ...
    @property
    def max_open_files(self) -> int: ...
    @property
    def is_remote(self) -> bool: ...

    def locate(self, shard: Shard) -> Path:
        """Return the shard's file on this machine. Raises UserError when it cannot be had."""

    def prefetch(self, shard: Shard) -> None:
        """See to it that `locate` will be quick, unless another process does so already. Raises as `locate`."""

    def tokenizer(self) -> Tokenizer:
        """Return the set's tokenizer. Raises UserError when it is not the one that made the shards."""


@dataclass(frozen=True)
class FolderSet:
    """A shard set in a folder."""

    folder: Path
    index: Index
    max_open_files: int = _OPEN_FILES
    is_remote: bool = False

    @property
    def location(self) -> str:
        return str(self.folder)

    def locate(self, shard: Shard) -> Path:
        return self.folder / shard.name

    def prefetch(self, shard: Shard) -> None:
        """Nothing to do."""

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder, self.index)


def open_shard_folder(folder: Path) -> FolderSet:
    """Open a folder. Raises UserError when the index or a shard is missing or wrong."""
    index = read_index(folder)
    check_shard_files(folder, index)
    return FolderSet(folder, index)
