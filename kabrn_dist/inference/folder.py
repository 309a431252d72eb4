"""Folders of runs and exports, looked at without torch: a wrong one is answered with what it is, at once."""

from __future__ import annotations

from pathlib import Path

from kabrn_dist.data.index import INDEX_NAME
from kabrn_dist.utils.errors import UserError

WEIGHTS_NAME, WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
SHOWN_FOLDERS = 8


def is_export(folder: Path) -> bool:
    """Return whether a folder is an export rather than a run."""
    files = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME, "tokenizer.json")
    is_run = (folder / "checkpoints").is_dir() or (folder / "log.jsonl").exists()
    is_data = (folder / INDEX_NAME).exists()
    return not is_run and not is_data and any((folder / file).exists() for file in files)


def check_run_folder(folder: Path, file: str | None = None) -> None:
    """Check that a run's folder exists and contains a file.

    Args:
        folder: The run's folder.
        file: Name of the file; None checks the folder only.

    Raises:
        UserError: if not; the message says what the folder is, or lists the runs and exports next to one that does not
            exist.
    """
    if folder.is_file():
        raise UserError(f"{folder}: is a file; name the folder of a run (run.folder of its configuration)")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {list_neighbors(folder)}")
    if is_export(folder):
        raise UserError(f"{folder}: is an export; name the run that it was made from, which has what this needs")
    if file is None or (folder / file).exists():
        return
    if (folder / INDEX_NAME).exists():
        raise UserError(f"{folder}: holds shards; name the folder of a run that was trained on them (its run.folder)")
    for parent in folder.parents[:2]:
        if (parent / file).exists():
            raise UserError(f"{folder}: is a part of a run; name the run's folder, {parent}")
    raise UserError(f"{folder / file}: no such file; name the folder of a run that has trained (its run.folder)")


def list_neighbors(folder: Path) -> str:
    """Return which runs and exports lie beside a folder, as the end of a message."""
    names = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
    if not names:
        return "name the folder of a run (run.folder of its configuration)"
    more = f" and {len(names) - SHOWN_FOLDERS} more" if len(names) > SHOWN_FOLDERS else ""
    return f"{folder.parent} contains {', '.join(names[:SHOWN_FOLDERS])}{more}"
