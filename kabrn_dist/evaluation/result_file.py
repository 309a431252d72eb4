"""Results of one task in a file of JSON lines: appended while they come, continued after a kill, ordered at the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kabrn_dist.evaluation.answering import ExampleResult
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.lock import PATIENCE_SECONDS, flock_exclusive
from kabrn_dist.utils.safe_open import read_plain

RESULTS_FORMAT, RESULTS_VERSION = "mixkabrn evaluation", 1
# Results of ten million examples are smaller.
RESULTS_BYTES_LIMIT = 16 << 30
SYNC_SECONDS = 1.0
SHOWN_VALUE, SHOWN_DIGITS = 60, 12


class ResultFile:
    """The results of a task, whose first line says of what they are results.

    Attributes:
        path: The file.
        results: Results by example, those of earlier sessions included.

    Args:
        path: The file; it need not exist.
        header: What all results in it share, but for the model.

    Raises:
        UserError: for a file of something else, of other settings, or that another process is writing.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.results: dict[str, ExampleResult] = {}
        self._header = {"format": RESULTS_FORMAT, "version": RESULTS_VERSION, **header}
        self._found: dict[str, Any] | None = None
        self._synced = time.monotonic()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror}); choose another folder with --out") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()
            raise

    def begin(self, model: Mapping[str, str]) -> None:
        """Write the first line, or check that the results that are there are of the same model.

        Args:
            model: Name and fingerprint.

        Raises:
            UserError: if they are of another one.
        """
        if self._found is None:
            self._header |= {"model": dict(model)}
            self._write(self._header)
            self._found = self._header
            return
        theirs = self._found.get("model", {})
        if theirs.get("fingerprint") != model["fingerprint"]:
            raise UserError(
                f"{self.path}: holds results of another model or tokenizer, {theirs.get('name')} with the fingerprint "
                f"{str(theirs.get('fingerprint'))[:SHOWN_DIGITS]}, and this is {model['name']} with "
                f"{model['fingerprint'][:SHOWN_DIGITS]}; "
                "choose another folder with --out, or remove the file"
            )

    def append(self, result: ExampleResult) -> None:
        """Add the result of an example.

        Raises:
            UserError: if the disk refuses.
        """
        self._write(result.to_json())
        self.results[result.id] = result
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make all that was appended durable."""
        os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def finish(self, order: Sequence[str]) -> None:
        """Put the results in the order of the examples: the file is then the same whatever happened on the way.

        Args:
            order: Ids of all examples of the split, of which some have results.
        """
        ids = [id for id in order if id in self.results]
        lines = [self._found or self._header, *(self.results[id].to_json() for id in ids)]
        atomic_write(self.path, b"".join(map(_encode, lines)))

    def close(self) -> None:
        """Close the file, which unlocks it; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            is_ours = flock_exclusive(self._descriptor, PATIENCE_SECONDS)
        except OSError:
            # A file system without locks.
            return
        if not is_ours:
            raise UserError(
                f"{self.path}: another evaluation is writing there; wait for its end, or choose another folder with "
                "--out"
            )

    def _read(self) -> None:
        content = read_plain(self.path, RESULTS_BYTES_LIMIT, follow_links=True, remedy="choose another --out")
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if lines:
            found = _decode(lines[0])
            if len(lines) == 1 and found is not None and found.get("format") == RESULTS_FORMAT:
                # An evaluation that was stopped before its first result binds nobody.
                os.ftruncate(self._descriptor, 0)
                return
            self._found = self._check_header(found)
        for number, line in enumerate(lines[1:], 2):
            try:
                result = ExampleResult.from_json(_decode(line) or {})
            except TypeError as error:
                raise UserError(f"{self.path}: line {number} is no result; remove the line, or the file") from error
            self.results.setdefault(result.id, result)
        if len(whole) < len(content):
            # What a killed session has half written.
            os.ftruncate(self._descriptor, len(whole))

    def _check_header(self, found: dict[str, Any] | None) -> dict[str, Any]:
        sections = [(found or {}).get(key, {}) for key in ("settings", "model")]
        if found is None or found.get("format") != RESULTS_FORMAT or not all(isinstance(s, dict) for s in sections):
            raise UserError(f"{self.path}: is not a file of results; choose another folder with --out")
        for key, value in _flatten_header(self._header).items():
            theirs = _flatten_header(found).get(key)
            if theirs != value:
                raise UserError(
                    f"{self.path}: holds results with {key} {_shorten(theirs)}, this evaluation has {_shorten(value)}; "
                    "choose another folder with --out, the same settings, or remove the file"
                )
        if (theirs := found.get("data_sha256")) != (ours := self._header.get("data_sha256")):
            raise UserError(
                f"{self.path}: holds results of other examples, those of {found.get('data')} (sha256 "
                f"{str(theirs)[:SHOWN_DIGITS]}); this evaluation reads {self._header.get('data')} "
                f"({str(ours)[:SHOWN_DIGITS]}); choose another folder with --out, the same --data, or remove the file"
            )
        return found

    def _write(self, values: Mapping[str, Any]) -> None:
        line = _encode(values)
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make room, and the same command goes on"
            ) from error


def _flatten_header(header: Mapping[str, Any]) -> dict[str, Any]:
    # Other settings choose other examples: they are what should be told. The same data may lie elsewhere.
    flat = {key: value for key, value in header.items() if key not in ("settings", "model", "data_sha256", "data")}
    return flat | dict(header.get("settings", {}))


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}…"


def _encode(values: Mapping[str, Any]) -> bytes:
    # ASCII, as a model may write halves of surrogate pairs, which UTF-8 does not have.
    return json.dumps(values, ensure_ascii=True).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
