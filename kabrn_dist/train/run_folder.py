"""Files of a run's folder beside its checkpoints: its configuration, its tokenizer, and copies of its log."""

from __future__ import annotations

import shutil
from pathlib import Path

from kabrn_dist.checkpoint.layout import list_checkpoints, step_of
from kabrn_dist.config import Config
from kabrn_dist.config.file import dump_config
from kabrn_dist.data.index import TOKENIZER_NAME
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError


def write_config(config: Config) -> None:
    """Write the configuration of a run to its folder, in place of that of an earlier session."""
    atomic_write(config.run.folder / "config.yaml", dump_config(config).encode())


def write_description(config: Config, tokenizer: Tokenizer, replace_config: bool) -> None:
    """Write what `export` and `generate` need of a run beside its weights: configuration, tokenizer and chat template.

    Args:
        config: the whole configuration.
        tokenizer: the tokenizer of the run's data.
        replace_config: whether a configuration that is there is replaced; not before a resumed session has saved.
    """
    if replace_config or not (config.run.folder / "config.yaml").exists():
        write_config(config)
    tokenizer.save(config.run.folder / TOKENIZER_NAME)


def keep_log(folder: Path, step: int) -> list[str]:
    """Copy a run's log before it is truncated to `step`, if a later checkpoint is kept.

    Args:
        folder: the run's folder.
        step: the log's last step from now on.

    Returns:
        What the console says of the copy; nothing if there is none.

    Raises:
        UserError: if there are too many copies.
    """
    log = folder / "log.jsonl"
    if not log.exists() or all(step_of(path) <= step for path in list_checkpoints(folder / "checkpoints")):
        return []
    names = (folder / f"log.before-step-{step:08d}{suffix}.jsonl" for suffix in ("", *map(".{}".format, range(2, 99))))
    copy = next((name for name in names if not name.exists()), None)
    if copy is None:
        raise UserError(f"{folder}: holds too many copies of log.jsonl; move log.before-step-* away")
    shutil.copyfile(log, copy)
    return [f"log.jsonl goes on after step {step}; later steps, of which a checkpoint is kept, are in {copy}"]
