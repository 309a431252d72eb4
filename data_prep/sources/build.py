"""Build a source from the name of its kind and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.sources import DataSource
from data_prep.sources.amps import Amps
from data_prep.sources.base import FileSource
from data_prep.sources.code import Code
from data_prep.sources.conversations import Conversations, ConversationsParquet, Rendering
from data_prep.sources.jsonl import Jsonl
from data_prep.sources.m2d2 import M2D2
from data_prep.sources.math import Math
from data_prep.sources.openqa import OpenQA
from data_prep.sources.parquet import Parquet
from data_prep.sources.python_stdlib import PythonStdlib
from data_prep.sources.text import Text
from kabrn_dist.utils.errors import UserError

_SOURCES: tuple[type[FileSource], ...] = (
    *(M2D2, Math, Amps, Code, OpenQA, Text, Jsonl, Parquet, PythonStdlib),
    *(Conversations, ConversationsParquet),
)
SOURCE_CLASSES = {source.kind: source for source in _SOURCES}


def build_source(
    kind: str,
    inputs: Sequence[Path],
    options: Mapping[str, Any],
    out: Path | None = None,
    rendering: Rendering | None = None,
) -> DataSource:
    """Build a source.

    Args:
        kind: name of the kind.
        inputs: files and folders to read.
        options: options of the kind.
        out: the folder for the shards: no input, even if it lies in one.
        rendering: how conversations become text; None: by the default template.

    Raises:
        UserError: the kind is unknown, or an option is unknown or wrong.
    """
    if kind not in SOURCE_CLASSES:
        raise UserError(f"source {kind!r}: no such kind; choose from {', '.join(SOURCE_CLASSES)}")
    options_class = SOURCE_CLASSES[kind].options_class
    known = ", ".join(options_class.model_fields) or "none"
    try:
        checked = options_class.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:1]))
        if first["type"] == "extra_forbidden":
            raise UserError(f"source {kind}: no option {name!r}; its options are: {known}") from error
        message = first["msg"].removeprefix("Value error, ")
        given = f" is {first['input']!r}" if name else ""
        raise UserError(f"source {kind}: {f'option {name!r}{given}: ' if name else ''}{message}") from error
    source = SOURCE_CLASSES[kind](inputs, checked)
    source.out = out
    if rendering is not None and isinstance(source, Conversations | ConversationsParquet):
        source.rendering = rendering
    return source
