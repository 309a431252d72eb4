"""Adapters as they are trained, made files of the C runtime in the cache folder. Needs numpy, no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from kabrn_dist.adapters.folder import read_adapter
from kabrn_dist.runtime.adapter_file import encode_adapter
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.utils.atomic_io import atomic_write, make_folder
from kabrn_dist.utils.cache_folder import cache_folder
from kabrn_dist.utils.errors import UserError

_OPTION = "--adapter"


def convert_adapter_options(model: Path, options: Sequence[str]) -> list[str]:
    """Return options of the runtime in which adapters as folders or .safetensors files are files of the runtime.

    Args:
        model: The model file that they are for.
        options: With adapters as `--adapter PATH`, `--adapter PATH=WEIGHT` or `--adapter=…`.

    Raises:
        UserError: for an adapter that is damaged or of another model, and if the cache folder cannot be written.
    """
    return list(_convert(model, options))


def _convert(model: Path, options: Sequence[str]) -> Iterator[str]:
    is_value = False
    for option in options:
        name, equals, value = option.partition("=")
        if is_value:
            yield _convert_value(model, option)
        elif name == _OPTION and equals:
            yield f"{_OPTION}={_convert_value(model, value)}"
        else:
            yield option
        is_value = not is_value and option == _OPTION


def _convert_value(model: Path, value: str) -> str:
    path, equals, weight = value, "", ""
    if not os.path.exists(value) and _is_number(value.rpartition("=")[2]):
        path, equals, weight = value.rpartition("=")
    if not path:
        raise UserError(f"{_OPTION} {value!r}: names no adapter; give a folder or a file")
    is_trained = os.path.isdir(path) or path.endswith(".safetensors")
    return f"{_convert_file(model, Path(path))}{equals}{weight}" if is_trained else value


def _is_number(text: str) -> bool:
    """Also of what is no weight, such as nan, so that the runtime says so."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _convert_file(model: Path, adapter: Path) -> Path:
    content = encode_adapter(read_adapter(adapter), read_model_file(model, verify=False))
    try:
        folder = cache_folder() / "adapters"
    except RuntimeError as error:
        raise UserError(f"{adapter}: no folder to convert it in ({error}); set XDG_CACHE_HOME to one") from error
    # The file's own sha256: the same adapter has the same name.
    converted = folder / f"{content[24:40].hex()}.mka"
    if not converted.exists():
        make_folder(folder)
        atomic_write(converted, content)
    return converted
