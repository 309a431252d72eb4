"""What is learned from: notes and conversations of the user, as tokens of bounded length."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.sources.conversations import MalformedConversation, check_turns, list_turns
from data_prep.sources.decode import decode_document
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.online_learning.chat_writer import ChatWriter, Message
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

NOTE_ENDINGS, CONVERSATION_ENDINGS = (".txt", ".md", ".markdown", ".rst"), (".jsonl",)
FILE_BYTES_LIMIT = 16 << 20
# More would not be read within the minutes that learning takes.
TOTAL_BYTES_LIMIT = 64 << 20
FILES_LIMIT = 10_000
_SHOWN = 5


class Sample(NamedTuple):
    """A text to learn from, which a model reads from an empty state.

    Attributes:
        ids: Its tokens.
        learned: Whether each carries loss; the first never does.
    """

    ids: list[int]
    learned: list[bool]

    @property
    def targets(self) -> int:
        """Number of tokens that carry loss."""
        return sum(self.learned[1:])


@dataclass
class Notes:
    """What was read of a file or a folder.

    Attributes:
        samples: To learn from.
        files: Number of files that gave some.
        left_out: Reasons for which something was left out, and how often.
        examples: Names of some of what was left out, with the reason.
    """

    samples: list[Sample] = field(default_factory=list)
    files: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def leave_out(self, name: str, reason: str, detail: str = "") -> None:
        """Count something that is left out."""
        self.left_out[reason] += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(f"{name}: {detail or reason}")


class SampleReader:
    """Makes samples for a model.

    Args:
        tokenizer: The model's tokenizer.
        writer: How its conversations are written.
        note_tokens: Longest sample of a note; a longer text becomes several.
        conversation_tokens: Longest conversation; of a longer one the first turns are left out.
    """

    def __init__(self, tokenizer: Tokenizer, writer: ChatWriter, note_tokens: int, conversation_tokens: int) -> None:
        self._tokenizer, self._writer = tokenizer, writer
        self._note_tokens, self._conversation_tokens = note_tokens, conversation_tokens

    def read(self, path: Path) -> Notes:
        """Read a file, or all files of a folder.

        Raises:
            UserError: if there is nothing to learn from, or the file cannot be read.
        """
        notes = Notes()
        in_folder = os.path.isdir(path)
        files = _list_files(path) if in_folder else [path]
        total = 0
        for file in files[:FILES_LIMIT]:
            before = len(notes.samples)
            total += self._read_file(file, in_folder, notes)
            notes.files += len(notes.samples) > before
            if total > TOTAL_BYTES_LIMIT:
                break
        unread = len(files) - (files.index(file) + 1 if files else 0)
        if unread:
            notes.leave_out(str(path), "beyond the limit", f"{unread} files are beyond {TOTAL_BYTES_LIMIT >> 20} MB")
        if not notes.samples:
            why = f": {'; '.join(notes.examples)}" if notes.examples else ""
            raise UserError(
                f"{path}: nothing to learn from{why}; give text ({', '.join(NOTE_ENDINGS)}), or conversations "
                f"({', '.join(CONVERSATION_ENDINGS)})"
            )
        return notes

    def conversation(self, messages: Sequence[Message]) -> Sample:
        """Return the sample of a conversation, of which only the last answer is learned.

        Raises:
            UserError: if the answer alone is too long.
        """
        tokens = self._fit(messages)
        if tokens is None:
            raise UserError(
                f"the answer and its question have more than {self._conversation_tokens} tokens; give a shorter one, "
                "or raise --memory"
            )
        ids, learned = tokens
        count = sum(self._writer.write(messages[-2:]).learned)
        first = len(ids) if not count else [at for at, each in enumerate(learned) if each][-count]
        return Sample(ids, [each and at >= first for at, each in enumerate(learned)])

    def _read_file(self, file: Path, in_folder: bool, notes: Notes) -> int:
        """Add the samples of a file; return its size."""
        try:
            content = read_plain(file, FILE_BYTES_LIMIT, follow_links=not in_folder)
        except UserError as error:
            if not in_folder:
                raise
            notes.leave_out(str(file), "cannot be read", str(error).partition(": ")[2])
            return 0
        document = decode_document(file.name, content)
        if document.text is None:
            notes.leave_out(str(file), "no text", document.problem)
        elif file.suffix.lower() in CONVERSATION_ENDINGS:
            self._add_conversations(file, document.text, notes)
        elif document.text.strip():
            notes.samples += self._divide(self._tokenizer.encode(document.text))
        else:
            notes.leave_out(str(file), "empty")
        return len(content)

    def _divide(self, ids: list[int]) -> Iterator[Sample]:
        """Yield a note in pieces; each begins with the token that the last one ends with."""
        ids = [self._tokenizer.document_token, *ids, self._tokenizer.document_token]
        step = self._note_tokens - 1
        for start in range(0, len(ids) - 1, step):
            piece = ids[start : start + self._note_tokens]
            yield Sample(piece, [False, *[True] * (len(piece) - 1)])

    def _add_conversations(self, file: Path, text: str, notes: Notes) -> None:
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            name = f"{file}:{number}"
            try:
                messages = _parse_conversation(json.loads(line))
                tokens = self._fit(messages)
            except MalformedConversation as error:
                notes.leave_out(name, error.reason, str(error))
            except (ValueError, RecursionError):
                notes.leave_out(name, "not JSON")
            except UserError as error:
                notes.leave_out(name, "refused by the template", str(error))
            else:
                if tokens is None:
                    notes.leave_out(name, "too long")
                else:
                    notes.samples.append(tokens)

    def _fit(self, messages: Sequence[Message]) -> Sample | None:
        """Return a conversation without as many of its first turns as it takes; None if its last answer is too long."""
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        while turns:
            sample = Sample(*self._writer.write([*system, *turns]))
            if len(sample.ids) <= self._conversation_tokens:
                return sample
            turns = turns[2:]
        return None


def _parse_conversation(record: Any) -> list[Message]:
    turns = list_turns(record)
    if turns is None:
        raise MalformedConversation("another layout", "has neither messages, conversations, nor prompt and completion")
    check_turns(turns)
    return [turn._asdict() for turn in turns]


def _list_files(folder: Path) -> list[Path]:
    """Files of a folder that may be notes, but for hidden ones."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in (*NOTE_ENDINGS, *CONVERSATION_ENDINGS) and path.is_file() and not hidden:
            found.append(path)
    return found
