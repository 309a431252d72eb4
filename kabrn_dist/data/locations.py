"""Where a configuration says that its shards are, looked at before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from kabrn_dist.config import DataConfig
from kabrn_dist.data.index import INDEX_NAME
from kabrn_dist.utils.errors import UserError


def check_locations(data: DataConfig, vocab_size: int | None = None) -> None:
    """Check that the folders of a configuration's shards exist; URLs are passed over.

    Args:
        data: The section of the configuration.
        vocab_size: The model's vocabulary, for the command that the message gives; None if it is left out.

    Raises:
        UserError: for the first that does not hold shards, with the key and the command that makes them.
    """
    keys = {"data.path": data.path}
    keys |= {f"data.extra_sets.{number}.path": extra.path for number, extra in enumerate(data.extra_sets)}
    for key, text in keys.items():
        path = Path(text)
        if "://" in text or (path / INDEX_NAME).exists():
            continue
        if path.is_file():
            raise UserError(f"{key} {path}: is a file; set {key} to the folder that it lies in, {path.parent}")
        problem = f"has no {INDEX_NAME}, so it holds no shards" if path.is_dir() else "no such folder"
        # Texts of one's own, except where a configuration in configs/ asks for the set that needs none.
        source = "python-stdlib" if path.name == "python-stdlib" else "text --input TEXTS"
        vocabulary = f" --vocabulary {vocab_size}" if vocab_size else ""
        start = "" if path.is_absolute() else f" in {Path.cwd()}, where the command was started"
        raise UserError(
            f"{key} {path}: {problem}{start}; make it with `mixkabrn prepare --source {source}{vocabulary} --out "
            f"{path}`, or set {key} to the folder of your shards"
        )
