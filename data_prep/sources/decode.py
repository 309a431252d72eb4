"""Decode bytes as text, or describe why they are not text."""

from __future__ import annotations

import codecs

from data_prep.documents import Document, Span

_MAX_RAW_BYTES = 4 << 20
_CHECKED_BYTES = 8192
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


def make_document(name: str, text: str, *, spans: tuple[Span, ...] | None = None, key: str | None = None) -> Document:
    """Return a document of `text`, or one without text if it contains half a surrogate pair, which JSON allows."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"half a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}"
        raw = text.encode("utf-8", "surrogatepass") if spans is None else None
        return Document(name, None, key=key, problem=problem, raw=_small(raw))
    return Document(name, text, spans, key)


def decode_document(name: str, content: bytes) -> Document:
    """Return a document of UTF-8 `content`, byte for byte, or one that describes why it is not text."""
    if content.startswith(_WIDE_MARKS):
        return Document(name, None, problem="UTF-16 or UTF-32, not UTF-8", raw=_small(content), lost_bytes=len(content))
    if b"\0" in content[:_CHECKED_BYTES]:
        return Document(name, None, problem="binary: a zero byte in its first 8 KiB", lost_bytes=len(content))
    try:
        return Document(name, content.decode())
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte {content[error.start]:#04x} at {error.start}"
        return Document(name, None, problem=problem, raw=_small(content), lost_bytes=len(content))


def make_spans(start: int, text: str, masked: bool) -> tuple[Span, ...] | None:
    """Return the span from `start` to the end of `text` if `masked`, else None, so that all of it carries loss."""
    return (Span(start, len(text)),) if masked else None


def printable_name(name: str) -> str:
    """Return a file's name as valid Unicode; bytes that are not UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _small(raw: bytes | None) -> bytes | None:
    return raw if raw is not None and len(raw) <= _MAX_RAW_BYTES else None
