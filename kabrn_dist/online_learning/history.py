"""The folder of an adapter that is learned further, and what it was before each learning.

NAME/ is the adapter as it is now. NAME.history/0001/ is what it was before the first learning, and so on; an empty one
says that there was nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.adapters.folder import ADAPTER_CONFIG_NAME, ADAPTER_NAME, read_adapter, write_adapter
from kabrn_dist.utils.atomic_io import atomic_write, make_folder
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

KEPT_VERSIONS = 20
_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_NAME)
_BYTES_LIMIT = 4 << 30


class AdapterHistory:
    """Versions of an adapter on the disk.

    Args:
        folder: The adapter's folder, which need not be there yet.

    Raises:
        UserError: for a folder that holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._versions = folder.with_name(f"{folder.name}.history")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; give --out a folder of its own")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / ADAPTER_NAME).exists():
            raise UserError(f"{folder}: holds something else than an adapter; give --out a folder of its own")

    @property
    def exists(self) -> bool:
        """Whether there is an adapter."""
        return (self.folder / ADAPTER_NAME).exists()

    def read(self) -> Adapter | None:
        """Return the adapter as it is now; None if there is none.

        Raises:
            UserError: for a damaged one.
        """
        return read_adapter(self.folder) if self.exists else None

    def save(self, adapter: Adapter) -> None:
        """Write an adapter, and keep what was there as a version to go back to.

        Raises:
            UserError: if the disk refuses; what was there is then still there.
        """
        make_folder(self._versions)
        numbers = self._numbers()
        version = self._versions / f"{(numbers[-1] if numbers else 0) + 1:04d}"
        make_folder(version)
        if self.exists:
            _copy(self.folder, version)
        write_adapter(adapter, self.folder)
        for number in numbers[: max(0, len(numbers) + 1 - KEPT_VERSIONS)]:
            shutil.rmtree(self._versions / f"{number:04d}", ignore_errors=True)

    def undo(self) -> Adapter | None:
        """Go back to what was there before the last `save`, and return it; None if there was nothing.

        Raises:
            UserError: if there is nothing to go back to, or the disk refuses.
        """
        numbers = self._numbers()
        if not numbers:
            raise UserError(f"{self.folder}: nothing was learned that could be taken back")
        version = self._versions / f"{numbers[-1]:04d}"
        if (version / ADAPTER_NAME).exists():
            _copy(version, self.folder)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(version, ignore_errors=True)
        return self.read()

    def _numbers(self) -> list[int]:
        if not self._versions.is_dir():
            return []
        return sorted(int(path.name) for path in self._versions.iterdir() if path.name.isdecimal() and path.is_dir())


def _copy(source: Path, target: Path) -> None:
    """Copy the files of an adapter; the last one is all that a reader needs."""
    make_folder(target)
    for name in _FILES:
        if (source / name).exists():
            atomic_write(target / name, read_plain(source / name, _BYTES_LIMIT))
