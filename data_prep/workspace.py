"""The folder of an unfinished preparation: who may work in it, what it holds, and whether it can be continued.

OUT/.work/ holds runs/ (documents that were read), pairs/ (duplicates), shards/ (a record of each shard in OUT),
dropped.npy, tokenizer.json, shard_plan.json, and what belongs to a single run: locks/, progress/, lock. The folder is
removed at the end.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from data_prep.workers import clear_folder
from kabrn_dist.data.index import INDEX_NAME, TOKENIZER_NAME
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.lock import flock_exclusive

_OWN_FILES = ("*-train-*.tar", "*-validation-*.tar", "*.tar.tmp", f"{TOKENIZER_NAME}*", f"{INDEX_NAME}.tmp", "report.*")
_INPUTS = ".inputs"
# Version of the files in the workspace. What another version left unfinished cannot be continued.
_FORMAT = "workspace 2"


class Workspace:
    """Paths and life cycle of the preparation of one folder.

    Attributes:
        out: folder for the shards.
        folder: folder for intermediate files.
        runs: folder of the sorted runs of documents.
        pairs: folder of the pairs of duplicates.
        shards: folder of the shards' records.
        task_locks: folder of the tasks' lock files.
        progress: folder in which workers publish their progress.
        dropped: file with the ids of the documents that are duplicates.
        tokenizer: file of the tokenizer.
        shard_plan: file with the list of shards to make.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / ".work"
        self.runs, self.pairs, self.shards = (self.folder / name for name in ("runs", "pairs", "shards"))
        self.task_locks, self.progress = self.folder / "locks", self.folder / "progress"
        self.dropped, self.tokenizer = self.folder / "dropped.npy", self.folder / TOKENIZER_NAME
        self.shard_plan = self.folder / "shard_plan.json"

    def is_finished(self, inputs: str) -> bool:
        """Return whether `out` was finished from these inputs, a digest that `read.digest_inputs` made."""
        return (self.out / INDEX_NAME).exists() and _read_text(self.out / _INPUTS) == inputs

    def open(self, inputs: str, force: bool) -> None:
        """Make the folders, or continue with those that a run with the same inputs left.

        Args:
            inputs: digest of the inputs.
            force: start over, and replace the data in `out`.

        Raises:
            UserError: `out` holds something else, or was started with other inputs or by another version.
        """
        started = _read_text(self.folder / _INPUTS)
        current = f"{inputs} {_FORMAT}"
        if not force:
            self._refuse_other_inputs(started, current)
        try:
            if force or started != current:
                self._clear()
            for folder in (self.runs, self.pairs, self.shards):
                folder.mkdir(parents=True, exist_ok=True)
            clear_folder(self.task_locks)
            clear_folder(self.progress)
        except OSError as error:
            raise UserError(f"--out {self.out}: {error.strerror}; choose a folder you can write to") from error
        atomic_write(self.folder / _INPUTS, current.encode())

    def close(self, inputs: str) -> None:
        """Record what `out` was made from, and remove the folder."""
        atomic_write(self.out / _INPUTS, inputs.encode())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _refuse_other_inputs(self, started: str | None, current: str) -> None:
        if started == current:
            return
        if started is not None:
            raise UserError(
                f"--out {self.out}: was started with another recipe or version, or its sources have changed since; "
                "restore them to continue, choose another folder, or add --force to start over"
            )
        if (self.out / INDEX_NAME).exists():
            raise UserError(
                f"--out {self.out}: is not empty, it holds data of another recipe, or of sources that have changed "
                "since; choose another folder, or add --force to replace its data"
            )
        if self.out.is_dir() and any(entry != self.folder for entry in self.out.iterdir()):
            raise UserError(
                f"--out {self.out}: is not empty; choose another folder, or add --force to replace its data"
            )

    def _clear(self) -> None:
        # The index first: from here on the old data does not look complete.
        (self.out / INDEX_NAME).unlink(missing_ok=True)
        (self.out / _INPUTS).unlink(missing_ok=True)
        for pattern in _OWN_FILES:
            for path in self.out.glob(pattern):
                path.unlink()
        for entry in self.folder.iterdir() if self.folder.exists() else ():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def acquire_workspace(out: Path) -> int:
    """Lock the preparation of `out`. Processes that inherit the descriptor hold the lock too.

    Returns:
        The file descriptor that holds the lock, for `release_workspace`.

    Raises:
        UserError: another preparation holds the lock, or the folder cannot be made.
    """
    folder = out / ".work"
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        if not flock_exclusive(descriptor):
            raise UserError(f"--out {out}: another preparation is at work there; wait for it, or choose another")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a folder you can write to") from error
    return descriptor


def release_workspace(out: Path, descriptor: int) -> None:
    """Unlock `out`, and remove the folders of a preparation that was refused before it started."""
    os.close(descriptor)
    folder = out / ".work"
    if folder.exists() and {entry.name for entry in folder.iterdir()} <= {"lock"}:
        shutil.rmtree(folder)
        if not any(out.iterdir()):
            out.rmdir()


def _read_text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
