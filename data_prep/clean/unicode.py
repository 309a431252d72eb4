"""Normalize texts: valid UTF-8, composed characters, no control characters.

A text is normalized in the pieces between the edges of its spans and marks, so that the spans of the result contain
exactly the normalized text of the original spans. Special tokens stay as they are.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from itertools import accumulate, pairwise

import ftfy
from ftfy.badness import BADNESS_RE, badness

from data_prep.clean.config import CleaningConfig
from data_prep.clean.removed import RemovedDocument
from data_prep.documents import Document, Span
from kabrn_dist.utils.errors import UserError

# Western accented letters stand alone among ASCII; other alphabets and binary data come in sequences.
_MAX_FRACTION_IN_SEQUENCES = 0.5
# So few bad bytes do not matter.
_MAX_FRACTION_IGNORED = 0.01

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Unicode category Cc without \t, \n and \r, and the byte order mark.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Non-ASCII characters with up to `_REACH` others between them: no pattern of ftfy is longer than that.
_REACH = 6
_FOREIGN = re.compile(f"[^\x00-\x7f]+(?:[\x00-\x7f]{{1,{_REACH}}}[^\x00-\x7f]+)*")
_ESCAPED = re.compile("[\udc80-\udcff]")
_ESCAPED_RUN = re.compile("[\udc80-\udcff]{2,}")


def normalize_document(document: Document, config: CleaningConfig) -> Document | RemovedDocument:
    """Return the normalized document, the same object if nothing changes, or the reason why it is removed.

    Reasons are "unreadable" (neither text nor bytes), "binary", and "encoding" (if broken documents are dropped, or the
    bytes cannot be repaired).

    Raises:
        UserError: the document is broken and `config.broken` is "refuse".
    """
    if document.text is None:
        return _decode_document(document, config)
    text = document.text
    if not text.isascii() and _SURROGATE.search(text) and config.broken != "repair":
        return _reject(document, config, "half of a surrogate pair")
    edges = _edges(document)
    marks = set(document.marks or ())
    pieces = [
        text[start:stop] if (start, stop) in marks else _normalize_piece(text[start:stop], config)
        for start, stop in pairwise(edges)
    ]
    new = "".join(pieces)
    if new == text:
        return document
    new_edges = dict(zip(edges, accumulate(map(len, pieces), initial=0), strict=True))

    def move(spans: tuple[Span, ...] | None) -> tuple[Span, ...] | None:
        return None if spans is None else tuple(Span(new_edges[start], new_edges[stop]) for start, stop in spans)

    return document._replace(text=new, spans=move(document.spans), marks=move(document.marks))


def decode_bytes(raw: bytes) -> str | None:
    """Decode bytes as UTF-16 or UTF-32 by their byte order marks, as UTF-8, or else as Windows-1252.

    Central European encodings cannot be distinguished from Windows-1252: some of their accents come out wrong.

    Returns:
        The text; None if most of the bytes that are not UTF-8 come in sequences, as those of other alphabets do.
    """
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            try:
                return raw.decode(encoding)
            except UnicodeDecodeError:
                return None
    text = raw.decode("utf-8", "surrogateescape")
    escaped = len(_ESCAPED.findall(text))
    in_sequences = sum(map(len, _ESCAPED_RUN.findall(text)))
    if in_sequences > _MAX_FRACTION_IN_SEQUENCES * escaped and escaped > _MAX_FRACTION_IGNORED * len(text):
        return None
    return _ESCAPED.sub(_decode_western_byte, text) if escaped else text


def _decode_document(document: Document, config: CleaningConfig) -> Document | RemovedDocument:
    raw = document.raw
    if raw is None:
        if config.broken == "refuse":
            raise UserError(f"{document.name}: {document.problem or 'no text'}; repair the file or leave it out")
        return RemovedDocument("unreadable", document, document.problem)
    if b"\x00" in raw and not raw.startswith(tuple(mark for mark, _ in _MARKS)):
        return _reject(document, config, "contains NUL bytes, so it is not text", reason="binary")
    if config.broken != "repair":
        return _reject(document, config, document.problem or "not UTF-8")
    text = decode_bytes(raw)
    if text is None:
        return RemovedDocument("encoding", document, "neither UTF-8 nor Western")
    return normalize_document(document._replace(text=text, raw=None, problem=""), config)


def _reject(document: Document, config: CleaningConfig, problem: str, reason: str = "encoding") -> RemovedDocument:
    if config.broken == "refuse":
        raise UserError(f"{document.name}: {problem}; convert the file to UTF-8, or set clean.broken to repair or drop")
    return RemovedDocument(reason, document, problem)


def _decode_western_byte(match: re.Match[str]) -> str:
    byte = bytes([ord(match[0]) - 0xDC00])
    try:
        return byte.decode("cp1252")
    except UnicodeDecodeError:
        return byte.decode("latin-1")


def _edges(document: Document) -> list[int]:
    """Return the edges of the pieces of a text, in order: both ends of the text and of every span and mark."""
    assert document.text is not None
    inner = {edge for span in (*(document.spans or ()), *(document.marks or ())) for edge in span}
    return sorted(inner | {0, len(document.text)})


def _normalize_piece(text: str, config: CleaningConfig) -> str:
    foreign = not text.isascii()
    # Control characters help to decode mojibake, and an accent may follow one, so composition comes last.
    if foreign and config.broken == "repair":
        text = _repair(text)
    if config.control:
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = _CONTROL.sub("", text)
    return unicodedata.normalize("NFC", text) if foreign and config.unicode == "nfc" else text


def _repair(text: str) -> str:
    """Join surrogates or replace them by U+FFFD, and undo mojibake in lines that get better by it."""
    if _SURROGATE.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not _may_be_mojibake(text):
        return text
    return "\n".join(_repair_line(line) if _may_be_mojibake(line) else line for line in text.split("\n"))


def _may_be_mojibake(text: str) -> bool:
    """Return whether ftfy finds mojibake; its slow pattern is only tried around non-ASCII characters."""
    return any(
        BADNESS_RE.search(text, max(foreign.start() - _REACH, 0), foreign.end() + _REACH)
        for foreign in _FOREIGN.finditer(text)
    )


def _repair_line(line: str) -> str:
    repaired = ftfy.fix_encoding(line)
    return repaired if badness(repaired) < badness(line) else line
