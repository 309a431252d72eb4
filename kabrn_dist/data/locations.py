"""Where a configuration says that its shards are, looked at before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from kabrn_dist.config import DataConfig
from kabrn_dist.data.index import INDEX_NAME
from kabrn_dist.utils.errors import UserError

# A message names so many folders.
_SHOWN = 3


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
        start = "" if path.is_absolute() else f" (in {Path.cwd()}, where the command was started)"
        vocabulary = f" --vocabulary {vocab_size}" if vocab_size else ""
        raise UserError(f"{key} {path}{start}: {_describe_missing(key, path, vocabulary)}")


def _describe_missing(key: str, path: Path, vocabulary: str) -> str:
    """What a path is that holds no shards, and how to get some."""
    if not path.is_dir() or not any(path.iterdir()):
        # Texts of one's own, except where a configuration in configs/ asks for the set that needs none.
        source = "python-stdlib" if path.name == "python-stdlib" else "text --input TEXTS"
        problem = "is empty" if path.is_dir() else "no such folder"
        return (
            f"{problem}; make it with `mixkabrn prepare --source {source}{vocabulary} --out {path}`, or set {key} to "
            "the folder of your shards"
        )
    if below := sorted(str(index.parent) for index in path.glob(f"*/{INDEX_NAME}")):
        return f"has no {INDEX_NAME}; shards lie below it: set {key} to {' or '.join(below[:_SHOWN])}"
    out = path.with_name(f"{path.name}-shards")
    return (
        f"has no {INDEX_NAME}, so it holds no shards; if it holds your texts, make shards of them with `mixkabrn "
        f"prepare --source text --input {path}{vocabulary} --out {out}`, and set {key} to {out}"
    )
