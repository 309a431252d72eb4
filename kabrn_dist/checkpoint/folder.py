"""The folder of a run's checkpoints on disk: names, commit, what is kept. No rank talks to another here.

step-00001200/        committed: found if it verifies
step-00001200.tmp/    being written, or left by a crash; never looked at
step-00001200.old/    being replaced by another save of its step; still found if a crash left it alone
step-00001500.aside/  from a future this run went back behind; never looked at, never deleted
latest                a hint for people; nothing reads it
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from kabrn_dist.checkpoint.manifest import MANIFEST_NAME, read_manifest
from kabrn_dist.errors import UserError

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,15})(\.old)?")


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
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.suffix == ""), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: not a checkpoint's name; expected something like step-00001200")
    return int(match[1])


def start_temporary(folder: Path, step: int) -> None:
    """Make the empty temporary directory, after removing what crashed saves left."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover)
    temporary_path(folder, step).mkdir()


def commit(folder: Path, step: int, manifest: bytes) -> None:
    """Write the manifest and rename the temporary directory: before the rename nothing, after it all."""
    temporary, final = temporary_path(folder, step), checkpoint_path(folder, step)
    write_durably(temporary / MANIFEST_NAME, manifest)
    # Read back as a later load will, so that nothing is committed that would then be refused.
    read_manifest(temporary)
    fsync_directory(temporary)
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    fsync_directory(folder)


def tidy(folder: Path, step: int, keep: int, keep_every: int, spare: Path | None) -> None:
    """What follows the commit of `step`: point `latest` at it, set newer ones aside, prune older ones."""
    final = checkpoint_path(folder, step)
    write_durably(folder / "latest.tmp", f"{final.name}\n".encode())
    os.replace(folder / "latest.tmp", folder / "latest")
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            _set_aside(path, step)
        elif path.name == f"{final.name}.old":
            _remove(path)
    _prune(folder, keep, keep_every, spare)
    fsync_directory(folder)


def write_durably(file: Path, data: bytes) -> None:
    """Write and fsync."""
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_directory(path: Path) -> None:
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
            _remove(path)


def _is_intact(path: Path) -> bool:
    try:
        read_manifest(path)
    except UserError:
        return False
    return True


def _remove(path: Path) -> None:
    # Manifest first: a crash half-way leaves a directory that nothing takes for a checkpoint.
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(path)


def _set_aside(path: Path, step: int) -> None:
    # The run went back to before this checkpoint; left in place, a restart would resume the wrong future.
    aside = path.with_name(path.name + ".aside")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    logger.warning(
        "%s is newer than step %d just saved, so this run went back behind it: moved to %s, delete it if "
        "you do not need it",
        path,
        step,
        aside.name,
    )
