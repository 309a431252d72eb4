"""Shard sets, local or remote: index, tokenizer, and shards as files of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kabrn_dist.data.index import Index, Shard
from kabrn_dist.data.index_checks import check_shard_files
from kabrn_dist.data.index_io import read_index
from kabrn_dist.data.tokenizer import Tokenizer, load_folder_tokenizer

# Files that a process keeps open. Opening one again takes microseconds, on a network disk milliseconds.
MAX_OPEN_FILES = 512


class ShardSet(Protocol):
    """A set of shards that a run can read."""

    @property
    def index(self) -> Index:
        """Contents of the set."""

    @property
    def location(self) -> str:
        """Folder or URL, for messages."""

    @property
    def max_open_files(self) -> int:
        """Number of shards that a reader may keep open."""

    @property
    def is_remote(self) -> bool:
        """Whether `locate` may have to download."""

    def locate(self, shard: Shard) -> Path:
        """Return the shard's file on this machine, downloading it if needed.

        Raises:
            UserError: if it cannot be downloaded.
        """

    def prefetch(self, shard: Shard) -> None:
        """Download the shard for a later `locate`, unless another process is doing so.

        Raises:
            UserError: if it cannot be downloaded.
        """

    def tokenizer(self) -> Tokenizer:
        """Return the set's tokenizer.

        Raises:
            UserError: if it is not the one that made the shards.
        """


@dataclass(frozen=True)
class FolderSet:
    """A shard set in a folder.

    Attributes:
        folder: Folder of the index and the shards.
        index: Contents of the set.
        max_open_files: Number of shards that a reader may keep open.
        is_remote: False.
    """

    folder: Path
    index: Index
    max_open_files: int = MAX_OPEN_FILES
    is_remote: bool = False

    @property
    def location(self) -> str:
        """The folder, for messages."""
        return str(self.folder)

    def locate(self, shard: Shard) -> Path:
        """Return the shard's file."""
        return self.folder / shard.name

    def prefetch(self, shard: Shard) -> None:
        """Do nothing: the shard is here."""

    def tokenizer(self) -> Tokenizer:
        """Return the set's tokenizer.

        Raises:
            UserError: if it is not the one that made the shards.
        """
        return load_folder_tokenizer(self.folder, self.index)


def open_shard_folder(folder: Path) -> FolderSet:
    """Open a folder of shards.

    Raises:
        UserError: if the index or a shard is missing or wrong.
    """
    index = read_index(folder)
    check_shard_files(folder, index)
    return FolderSet(folder, index)
