"""The folder of an unfinished preparation: who may work in it, what it holds, and whether it can be continued.

OUT/.work/ holds runs/ (documents that were read), pairs/ (duplicates), pieces/ (encoded documents), shards/ (a record
of each shard in OUT), dropped.npy, tokenizer.json, chat_template.jinja, shard_plan.json, files.json (the files that the
preparation writes into OUT), and what belongs to a single run: locks/, progress/, lock. The folder is removed at the
end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from data_prep.input_digest import InputDigest
from data_prep.ownership import INPUTS_NAME, list_made_files
from data_prep.workers import clear_folder
from kabrn_dist.data.index import CHAT_TEMPLATE_NAME, INDEX_NAME, TOKENIZER_NAME
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.lock import flock_exclusive

# Version of the files in the workspace. What another version left unfinished cannot be continued.
_FORMAT = "workspace 5"
_SHOWN = 3


class Workspace:
    """Paths and life cycle of the preparation of one folder.

    Attributes:
        out: folder for the shards.
        folder: folder for intermediate files.
        runs: folder of the sorted runs of documents.
        pairs: folder of the pairs of duplicates.
        pieces: folder of encoded documents.
        shards: folder of the shards' records.
        task_locks: folder of the tasks' lock files.
        progress: folder in which workers publish their progress.
        dropped: file with the ids of the documents that are duplicates.
        tokenizer: file of the tokenizer.
        chat_template: file of its chat template.
        shard_plan: file with the list of shards to make.
        files: file with the names of all files that the preparation writes into `out`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / ".work"
        names = ("runs", "pairs", "pieces", "shards")
        self.runs, self.pairs, self.pieces, self.shards = (self.folder / name for name in names)
        self.task_locks, self.progress = self.folder / "locks", self.folder / "progress"
        self.dropped, self.tokenizer = self.folder / "dropped.npy", self.folder / TOKENIZER_NAME
        self.chat_template = self.folder / CHAT_TEMPLATE_NAME
        self.shard_plan, self.files = self.folder / "shard_plan.json", self.folder / "files.json"

    def is_finished(self, inputs: InputDigest) -> bool:
        """Return whether `out` was finished from these inputs."""
        finished = _read_inputs(self.out)
        return (self.out / INDEX_NAME).exists() and finished is not None and finished.digest == inputs.digest

    def open(self, inputs: InputDigest, force: bool) -> None:
        """Make the folders, or continue with those that a run with the same inputs left.

        Args:
            inputs: what is to be read.
            force: start over, and replace the data in `out`.

        Raises:
            UserError: `out` holds something else, or was started with other inputs or by another version.
        """
        started = _read_inputs(self.folder)
        current = inputs._replace(digest=f"{inputs.digest} {_FORMAT}")
        if force:
            self._refuse_foreign_files()
        else:
            self._refuse_other_inputs(started, current)
        try:
            if force or started is None or started.digest != current.digest:
                self._clear()
            for folder in (self.runs, self.pairs, self.pieces, self.shards):
                folder.mkdir(parents=True, exist_ok=True)
            clear_folder(self.task_locks)
            clear_folder(self.progress)
        except OSError as error:
            raise UserError(f"--out {self.out}: {error.strerror}; choose a folder you can write to") from error
        atomic_write(self.folder / INPUTS_NAME, current.dump())

    def claim_files(self, names: Iterable[str]) -> None:
        """Record the names of the files that the preparation will write into `out`, before it writes any of them.

        Raises:
            UserError: there is one of them already, which somebody else has put there.
        """
        names = sorted(names)
        for name in names:
            if os.path.lexists(self.out / name):
                raise UserError(
                    f"{self.out / name}: was not made by this preparation, which has to write a file of this name; "
                    "move it, or choose another --out"
                )
        atomic_write(self.files, json.dumps(names).encode())

    def close(self, inputs: InputDigest) -> None:
        """Record what `out` was made from, and remove the folder."""
        atomic_write(self.out / INPUTS_NAME, inputs.dump())
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """Remove all that this preparation has made."""
        self._clear()

    def _refuse_other_inputs(self, started: InputDigest | None, current: InputDigest) -> None:
        if started is not None and started.digest == current.digest:
            return
        if started is not None:
            raise UserError(
                f"--out {self.out}: was started with {started.describe_change(current)}, or by another version; "
                "restore them to continue, choose another folder, or add --force to start over"
            )
        if (self.out / INDEX_NAME).exists():
            finished = _read_inputs(self.out) or InputDigest("", "")
            raise UserError(
                f"--out {self.out}: is not empty, it holds data of {finished.describe_change(current)}; choose another "
                "folder, or add --force to replace its data"
            )
        if self.out.is_dir() and any(entry != self.folder for entry in self.out.iterdir()):
            raise UserError(f"--out {self.out}: is not empty, and holds no shards; choose another folder")

    def _refuse_foreign_files(self) -> None:
        own = list_made_files(self.out, self.folder)
        foreign = sorted(entry.name for entry in self.out.iterdir() if entry != self.folder and entry.name not in own)
        known = {"lock", *(path.name for path in self._work_paths())}
        foreign += sorted(f".work/{entry.name}" for entry in self.folder.iterdir() if entry.name not in known)
        if foreign:
            more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
            raise UserError(
                f"--out {self.out}: holds {', '.join(foreign[:_SHOWN])}{more}, which no preparation made there, and "
                "--force replaces only what an index.json or an unfinished preparation names; move your files, or "
                "choose another folder"
            )

    def _clear(self) -> None:
        names = sorted(list_made_files(self.out, self.folder))
        (self.folder / INPUTS_NAME).unlink(missing_ok=True)
        # The names are recorded before the index goes, which named them: a run that is killed here can be repeated.
        atomic_write(self.files, json.dumps(names).encode())
        # The index first: from here on the old data does not look complete.
        for name in (INDEX_NAME, *names):
            if name in names:
                (self.out / name).unlink(missing_ok=True)
        for path in self._work_paths():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _work_paths(self) -> list[Path]:
        """Return all paths in the folder but the lock, in the order in which they may be removed."""
        paths = [self.folder / INPUTS_NAME, self.runs, self.pairs, self.pieces, self.shards, self.task_locks]
        paths += [self.progress, self.dropped, self.tokenizer, self.chat_template]
        paths += [self.shard_plan, self.files]
        return [*(path.with_name(f"{path.name}.tmp") for path in paths), *paths]


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


def _read_inputs(folder: Path) -> InputDigest | None:
    path = folder / INPUTS_NAME
    return InputDigest.parse(path.read_text("utf-8", "surrogateescape")) if path.exists() else None
