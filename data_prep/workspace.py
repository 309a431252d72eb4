"""The folder of a preparation under way: who may work in it, what is in it, and whether it can be gone on with.

OUT/.work/ holds runs/ (what was read), pairs/ (duplicates), shards/ (a record for each shard in OUT), dropped.npy,
tokenizer.json, cut.json, and what lasts no longer than a run: claims/, notes/, lock. It is removed at the end.
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
# Version of the files in the workspace. One that another version left unfinished cannot be continued.
_FORMAT = 2


class Workspace:
    """Paths of a preparation of `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / ".work"
        self.runs, self.pairs, self.shards = (self.folder / name for name in ("runs", "pairs", "shards"))
        self.task_locks, self.progress = self.folder / "locks", self.folder / "progress"
        self.dropped, self.tokenizer, self.shard_plan = (
            self.folder / name for name in ("dropped.npy", TOKENIZER_NAME, "shard_plan.json")
        )

    def is_finished(self, inputs: str) -> bool:
        """Whether `out` was finished from these inputs (a line that `read.inputs_of` made)."""
        return (self.out / INDEX_NAME).exists() and _read(self.out / _INPUTS) == inputs

    def open(self, inputs: str, force: bool) -> None:
        """Make the folders, or go on with those that a run with the same inputs left; `force` begins anew.

        Raises UserError where `out` holds something else, or was begun with other inputs.
        """
        begun = _read(self.folder / _INPUTS)
        if not force:
            self._refuse_other_inputs(begun, inputs)
        try:
            if force or begun != inputs:
                self._clear()
            for folder in (self.runs, self.pairs, self.shards):
                folder.mkdir(parents=True, exist_ok=True)
            clear_folder(self.task_locks)
            clear_folder(self.progress)
        except OSError as error:
            raise UserError(f"--out {self.out}: {error.strerror}. Choose a folder you can write to.") from error
        atomic_write(self.folder / _INPUTS, inputs.encode())

    def close(self, inputs: str) -> None:
        """Note what `out` was made from, and remove the folder."""
        atomic_write(self.out / _INPUTS, inputs.encode())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _refuse_other_inputs(self, begun: str | None, inputs: str) -> None:
        if begun == inputs:
            return
        if begun is not None:
            raise UserError(
                f"--out {self.out}: was begun with another recipe, or its sources have changed since. "
                "Put them back to go on, choose another folder, or add --force to begin anew."
            )
        if (self.out / INDEX_NAME).exists():
            raise UserError(
                f"--out {self.out}: is not empty, it holds data of another recipe, or of sources that have changed "
                "since. Choose another folder, or add --force to replace its data."
            )
        if self.out.is_dir() and any(entry != self.folder for entry in self.out.iterdir()):
            raise UserError(
                f"--out {self.out}: is not empty. Choose another folder, or add --force to replace its data."
            )

    def _clear(self) -> None:
        # The index first: from here on the old data does not look whole.
        (self.out / INDEX_NAME).unlink(missing_ok=True)
        (self.out / _INPUTS).unlink(missing_ok=True)
        for pattern in _OWN_FILES:
            for path in self.out.glob(pattern):
                path.unlink()
        for entry in self.folder.iterdir() if self.folder.exists() else ():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def acquire_workspace(out: Path) -> int:
    """Lock the preparation of `out` and return the descriptor that holds the lock, for `release_workspace`.

    Raises UserError where another preparation holds it, or the folder cannot be made.
    """
    folder = out / ".work"
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: is a file. Give a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        if not flock_exclusive(descriptor):
            raise UserError(f"--out {out}: another preparation is at work there. Wait for it, or choose another.")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}. Choose a folder you can write to.") from error
    return descriptor


def release_workspace(out: Path, descriptor: int) -> None:
    """Unlock `out`, and leave no trace of a preparation that was refused before it began."""
    os.close(descriptor)
    folder = out / ".work"
    if folder.exists() and {entry.name for entry in folder.iterdir()} <= {"lock"}:
        shutil.rmtree(folder)
        if not any(out.iterdir()):
            out.rmdir()


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
