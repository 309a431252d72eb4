"""The folder of a run's checkpoints on disk: names, commit, what is kept. No rank talks to another here.

step-00001200/        committed: found if it verifies
step-00001200.tmp/    being written, or left by a crash; never looked at
step-00001200.old/    being replaced by another save of its step; still found if a crash left it alone
step-00001500.aside/  from a future this run went back behind; never looked at, replaced by another of its step only
latest                a hint for people; nothing reads it

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
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-([0-9]{8,15})(\.old)?")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is committed."""
    return folder / f"step-{step:08d}"


def temporary_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before its commit."""
    return folder / f"step-{step:08d}.tmp"


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, newest step first, none of them verified; empty without the folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: (step_of(path), path.suffix == ""), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: not a checkpoint's name; expected something like step-00001200")
    return int(match[1])


def start_temporary(folder: Path, step: int) -> None:
    """Make the empty temporary directory, after removing what crashed saves left.

    A leftover that cannot be removed is logged and, where its name is wanted, renamed: it blocks nothing.
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


def drop_temporary(folder: Path, step: int) -> None:
    """After a failed save: leave nothing of it. What cannot be removed is logged; the next save tries again."""
    temporary = temporary_path(folder, step)
    try:
        _remove_any(temporary)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s: cannot be removed now (%s)", temporary, error)


def commit(folder: Path, step: int, manifest: bytes) -> None:
    """Write the manifest and rename the temporary directory: before the rename nothing, after it all.

    Newer checkpoints are set aside before it: were it afterwards, a crash in between would leave the new
    checkpoint and a newer one of a future that this run went back behind, and the next start would take that.
    """
    temporary, final = temporary_path(folder, step), checkpoint_path(folder, step)
    inject_fault("save.manifest")
    write_durably(temporary / MANIFEST_NAME, manifest)
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


def tidy(folder: Path, step: int, keep: int, keep_every: int, spare: Path | None) -> None:
    """What follows the commit of `step`: prune, and point `latest` at it."""
    inject_fault("save.before_prune")
    final = checkpoint_path(folder, step)
    old = final.with_name(f"{final.name}.old")
    if old.exists():
        _remove_if_possible(old)
    _prune(folder, keep, keep_every, spare)
    # After pruning, which a disk too full for these few bytes needs most.
    write_durably(folder / "latest.tmp", f"{final.name}\n".encode())
    os.replace(folder / "latest.tmp", folder / "latest")
    fsync_folder(folder)


def write_durably(file: Path, data: bytes) -> None:
    """Write and fsync."""
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_folder(path: Path) -> None:
    """Make names in the directory as durable as the files behind them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int, keep_every: int, spare: Path | None) -> None:
    """Keep the `keep` newest intact ones, each `keep_every`-th step and `spare` (resolved); remove the rest.

    Damaged ones among the newest stay for a person to look at and count as nothing, so that they never
    push out a good one.
    """
    intact = 0
    for path in list_checkpoints(folder):
        if intact < keep:
            intact += _is_intact(path)
        elif path.resolve() != spare and not (keep_every and step_of(path) % keep_every == 0):
            _remove_if_possible(path)


def _is_intact(path: Path) -> bool:
    try:
        read_manifest(path)
    except UserError:
        return False
    return True


def _remove(path: Path) -> None:
    # Manifest first: a crash half-way leaves a directory that nothing takes for a checkpoint.
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    inject_fault("save.prune")
    # A call frees all that the kernel has cached of a file, a quarter of a second a gigabyte.
    files = [entry.path for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)]
    with ThreadPoolExecutor(max_workers=4) as removers:
        list(removers.map(os.unlink, files))
    shutil.rmtree(path)


def _remove_if_possible(path: Path) -> None:
    # One that stays must not keep the others; the next save tries again.
    try:
        _remove(path)
    except OSError as error:
        logger.warning("%s: old, but cannot be removed (%s)", path, error)


def _remove_any(path: Path) -> None:
    """A directory, or a file or link of that name, which is removed itself and never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _supersede(path: Path, step: int) -> None:
    # The run went back to before this checkpoint; left in place, a restart would resume the wrong future.
    inject_fault("save.aside")
    aside = path.with_name(path.name + ".aside")
    try:
        _remove_any(aside)
    except FileNotFoundError:
        pass
    except OSError:
        aside = _free_name(aside)
    path.rename(aside)
    logger.warning(
        "%s is newer than step %d being saved, so this run went back behind it: moved to %s, delete it if "
        "you do not need it",
        path,
        step,
        aside.name,
    )
