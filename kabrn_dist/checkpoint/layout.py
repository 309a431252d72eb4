"""Folder of a run's checkpoints on disk: names, commit, pruning. No rank communicates here.

step-00001200/             committed: found if it verifies
step-00001200.tmp/         being written, or left by a crash; never read
step-00001200.old/         being replaced by another save of its step; still found if a crash left it alone
step-00001500.superseded/  later than a step to which this run went back; never read, replaced by another of its step
latest                     name of the newest checkpoint, for users; nothing reads it

A link is never taken for a checkpoint: pruning would delete what it points to.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kabrn_dist.checkpoint.manifest import MANIFEST_NAME, read_manifest
from kabrn_dist.utils.atomic_io import atomic_write, durable_open, fsync_folder
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-([0-9]{8,15})(\.old)?")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the committed checkpoint of `step`."""
    return folder / f"step-{step:08d}"


def temporary_path(folder: Path, step: int) -> Path:
    """Return the path at which the checkpoint of `step` is written before its commit."""
    return folder / f"step-{step:08d}.tmp"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints, newest step first, none of them verified; empty without the folder.

    Raises:
        OSError: if the folder cannot be listed.
        UserError: for something else in the folder's place, such as a link to a disk that is not mounted.
    """
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise UserError(
                f"{folder}: is not a folder, or a link to one that is not there; restore it or move it away"
            )
        return []
    paths = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(paths, key=lambda path: (step_of(path), path.suffix == ""), reverse=True)


def list_links(folder: Path) -> list[str]:
    """Return the names of checkpoints that are no folders but links or files, which are never read.

    Raises:
        OSError: if the folder cannot be listed.
    """
    if not folder.is_dir():
        return []
    return sorted(
        path.name for path in folder.iterdir() if NAME.fullmatch(path.name) and (path.is_symlink() or not path.is_dir())
    )


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint.

    Raises:
        UserError: if it is not such a name.
    """
    match = NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: is not a checkpoint's name; name something like step-00001200")
    return int(match[1])


def check_name(path: Path, step: int) -> None:
    """Check that a checkpoint's name, if it is one that a save gives, says the step that its manifest says.

    The order of checkpoints comes from their names: under a wrong one an old checkpoint would be resumed from as the
    newest, or pruned as the oldest.

    Raises:
        UserError: if it does not.
    """
    if NAME.fullmatch(path.name) and step_of(path) != step:
        name = checkpoint_path(path.parent, step).name
        raise UserError(f"{path}: is the checkpoint of step {step} by its manifest; rename the folder to {name}")


def make_temporary(folder: Path, step: int) -> None:
    """Make the empty temporary folder of `step`, after removing those that crashed saves left.

    One that cannot be removed is logged, and renamed if its name is needed, so that it blocks nothing.

    Raises:
        OSError: from the file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*.tmp"):
        try:
            _remove_any(leftover)
        except OSError as error:
            logger.warning("%s: left by a crash and cannot be removed (%s); delete it", leftover, error)
            if leftover == temporary_path(folder, step):
                leftover.rename(_free_name(leftover))
    temporary_path(folder, step).mkdir()


def remove_temporary(folder: Path, step: int) -> None:
    """Remove what a failed save left. If that fails it is logged; the next save tries again."""
    temporary = temporary_path(folder, step)
    try:
        _remove_any(temporary)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s: cannot be removed now (%s)", temporary, error)


def commit(folder: Path, step: int, manifest: bytes) -> None:
    """Write the manifest and rename the temporary folder: before the rename there is no checkpoint, then a whole one.

    Newer checkpoints are renamed out of the way before it. Were that done afterwards, a crash in between would leave
    the new checkpoint and a newer one from before the run went back, which the next start would take.

    Args:
        folder: Folder of the checkpoints.
        step: Step of the checkpoint, whose temporary folder holds the files of all ranks.
        manifest: Content of the manifest, from `encode_manifest`.

    Raises:
        OSError: from the file system.
        UserError: if the manifest would be refused by a later load.
    """
    temporary, final = temporary_path(folder, step), checkpoint_path(folder, step)
    inject_fault("save.manifest")
    with durable_open(temporary / MANIFEST_NAME) as file:
        file.write(manifest)
    # Read back as a later load will, so that nothing is committed that would then be refused.
    read_manifest(temporary)
    fsync_folder(temporary)
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            _supersede(path, step)
    inject_fault("save.before_rename")
    if final.exists():
        old = final.with_name(final.name + ".old")
        if old.exists():
            # One of the two may be the only good checkpoint of this step.
            _remove(old if _is_intact(final) else final)
        if final.exists():
            final.rename(old)
    temporary.rename(final)
    fsync_folder(folder)
    inject_fault("save.renamed")


def prune(folder: Path, step: int, keep_last: int, keep_every: int, in_use: Path | None) -> None:
    """Remove old checkpoints after the commit of `step`.

    Damaged checkpoints among the newest stay for a user to look at. They are not counted, so that they never push out
    a good one. A checkpoint that cannot be removed is logged; the next save tries again.

    Args:
        folder: Folder of the checkpoints.
        step: Step that was just committed.
        keep_last: Number of newest intact checkpoints to keep.
        keep_every: Steps divisible by it are kept; 0 for none.
        in_use: Resolved path of a checkpoint to keep, if any.

    Raises:
        OSError: if the folder cannot be listed.
    """
    inject_fault("save.before_prune")
    old = checkpoint_path(folder, step).with_suffix(".old")
    if old.exists():
        _remove_if_possible(old)
    intact = 0
    for path in list_checkpoints(folder):
        if intact < keep_last:
            intact += _is_intact(path)
        elif path.resolve() != in_use and not (keep_every and step_of(path) % keep_every == 0):
            _remove_if_possible(path)


def write_latest(folder: Path, step: int) -> None:
    """Write the name of the checkpoint of `step` to `latest`.

    Raises:
        UserError: if the disk refuses.
    """
    atomic_write(folder / "latest", f"{checkpoint_path(folder, step).name}\n".encode())


def _is_intact(path: Path) -> bool:
    try:
        read_manifest(path)
    except UserError:
        return False
    return True


def _remove(path: Path) -> None:
    # The manifest first: a crash half-way leaves a folder that nothing takes for a checkpoint.
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    inject_fault("save.prune")
    # Each call frees all that the kernel has cached of a file, a quarter of a second a gigabyte.
    files = [entry.path for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(os.unlink, files))
    shutil.rmtree(path)


def _remove_if_possible(path: Path) -> None:
    # One that stays must not keep the others; the next save tries again.
    try:
        _remove(path)
    except OSError as error:
        logger.warning("%s: old, but cannot be removed (%s)", path, error)


def _remove_any(path: Path) -> None:
    """Remove a folder, or a file or link of that name, which is removed itself and never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _supersede(path: Path, step: int) -> None:
    # The run went back to before this checkpoint; left in place, a restart would resume from the wrong future.
    inject_fault("save.supersede")
    superseded = path.with_name(path.name + ".superseded")
    try:
        _remove_any(superseded)
    except FileNotFoundError:
        pass
    except OSError:
        superseded = _free_name(superseded)
    path.rename(superseded)
    logger.warning(
        "%s is newer than step %d, which is being saved, as this run went back behind it: moved to %s; delete it if "
        "you do not need it",
        path,
        step,
        superseded.name,
    )
