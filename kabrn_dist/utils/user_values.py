"""Values of a configuration as people write them: paths with `~`, URLs, and numbers within what can be computed."""

from __future__ import annotations

import os
import re
from typing import Any

# Protocols of data behind a URL.
URL_PROTOCOLS = ("s3", "gs", "http", "https", "hf")
# Products of two such sizes are within what an int64 counts; fp32 holds such numbers and their inverses.
LARGEST_COUNT = 10**15
LARGEST_NUMBER, SMALLEST_NUMBER = 1e30, 1e-30

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def read_path(text: str) -> str:
    """Return a path on this machine, with `~` expanded.

    Raises:
        ValueError: for an empty path, a URL, or the home of an unknown user.
    """
    _check_text(text)
    if match := _URL.match(text):
        raise ValueError(
            f"{match[1]}:// is a URL, and this must be a path on this machine; give one without {match[0]}"
        )
    return _expand(text)


def read_location(text: str) -> str:
    """Return a path on this machine, with `~` expanded, or a URL of a protocol that data can be read from.

    Raises:
        ValueError: for an empty path, another protocol, or the home of an unknown user.
    """
    _check_text(text)
    match = _URL.match(text)
    if match is None:
        return _expand(text)
    if match[1] not in URL_PROTOCOLS:
        works = ", ".join(f"{protocol}://" for protocol in URL_PROTOCOLS)
        raise ValueError(f"{match[0]} cannot be read; give the path of a folder, or a URL with {works}")
    return text


def check_number(value: Any) -> None:
    """Check that a number, if `value` is one, is not beyond all that can be computed with, and is written plainly.

    Raises:
        ValueError: if it is.
    """
    if isinstance(value, str):
        # `1e400` and 5,000 digits are texts in YAML, which validation would take for numbers.
        if not re.fullmatch(r"[-+]?[0-9_.]+([eE][-+]?[0-9]+)?", value.strip()):
            return
        text = value.strip()
        if "_" in text and not re.fullmatch(r"[-+]?[0-9]{1,3}(_[0-9]{3})+", text):
            raise ValueError(f"{text[:20]} has an underscore, which may only part groups of three digits; leave it out")
        try:
            value = float(text)
        except ValueError:
            return
        if abs(value) == float("inf"):
            raise ValueError(f"{text[:20]}… is too large a number; give a smaller one")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, int) and abs(value) > LARGEST_COUNT:
        raise ValueError(f"{_show(value)} is above {LARGEST_COUNT:.0e}, too large a number; give a smaller one")
    if isinstance(value, float) and abs(value) not in (0.0, float("inf")):
        if abs(value) > LARGEST_NUMBER:
            raise ValueError(f"{value:g} is beyond {LARGEST_NUMBER:.0e}, too large a number; give a smaller one")
        if abs(value) < SMALLEST_NUMBER:
            raise ValueError(f"{value:g} is below {SMALLEST_NUMBER:.0e}, too small a number; give a larger one, or 0")


def _show(number: int) -> str:
    return str(number) if abs(number) < 10**24 else f"a number of {len(str(abs(number)))} digits"


def _check_text(text: str) -> None:
    if not text.strip():
        raise ValueError("the path is empty; give one, such as . for the current folder")
    if "\0" in text:
        raise ValueError("a path cannot hold a NUL character; remove it")


def _expand(text: str) -> str:
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.partition("/")[0][1:]
        raise ValueError(f"there is no user {user!r} here; write ./{text} for a folder of that name")
    # `./~x` names a folder called ~x, and must not become ~x, which would be expanded when it is read again.
    return os.path.abspath(expanded) if os.path.normpath(expanded).startswith("~") else expanded
