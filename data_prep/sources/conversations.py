"""Conversations as .jsonl, .json or .parquet; each record is recognized by its fields.

- messages: `{"messages": [{"role": "user", "content": "…"}, …]}`
- ShareGPT: `{"conversations": [{"from": "human", "value": "…"}, …]}`
- prompt and completion: `{"prompt": "…", "completion": "…"}`

The chat template writes them as text. What stands in its marks of generation carries loss, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from data_prep.documents import Document, Span
from data_prep.sources.archive import Member
from data_prep.sources.base import FileSource, SourceOptions, parse_json_file, read_json_lines
from data_prep.sources.decode import make_document
from data_prep.sources.layout import LayoutMismatch, describe_record
from data_prep.sources.parquet import Parquet
from kabrn_dist.data.chat_template import ChatTemplate, list_marks
from kabrn_dist.data.default_template import DEFAULT_TEMPLATE
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN

CONVERSATION_KINDS = ("conversations", "conversations-parquet")

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_TURN_LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_COMPLETION = ("prompt", "completion")


class Rendering(NamedTuple):
    """How conversations become text.

    Attributes:
        template: the chat template.
        special_tokens: texts of the special tokens of the tokenizer.
    """

    template: str = DEFAULT_TEMPLATE
    special_tokens: tuple[str, ...] = (DOCUMENT_TOKEN, *list_marks(DEFAULT_TEMPLATE))


class Turn(NamedTuple):
    """What one side says.

    Attributes:
        role: system, user or assistant.
        content: the text.
    """

    role: str
    content: str


class MalformedConversation(Exception):
    """A record that is no conversation to learn from.

    Attributes:
        reason: short name, by which such records are counted.
        detail: particulars.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class ConversationOptions(SourceOptions):
    """Options of conversations: there are none."""


class Conversations(FileSource):
    """Conversations of .jsonl and .json files.

    Attributes:
        rendering: how they become text.
    """

    kind = "conversations"
    expected = "records with messages (role, content), conversations (from, value), or prompt and completion"
    endings = (".jsonl", ".json")
    options_class = ConversationOptions
    rendering = Rendering()

    @property
    def masked(self) -> bool:
        """Whether the documents have spans: yes, of what the assistant says."""
        return True

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield one document per record: a line of .jsonl, or an element of the list in .json."""
        if not member.name.lower().endswith(".json"):
            for item in read_json_lines(member):
                if isinstance(item, Document | LayoutMismatch):
                    yield item
                else:
                    yield make_conversation(*item, self.rendering)
            return
        content = parse_json_file(member)
        if isinstance(content, Document | LayoutMismatch):
            yield content
            return
        for number, record in enumerate(content if isinstance(content, list) else [content]):
            yield make_conversation(f"{member.name} item {number}", record, self.rendering)


class ConversationsParquet(Parquet):
    """Conversations of .parquet files.

    Attributes:
        rendering: how they become text.
    """

    kind = "conversations-parquet"
    expected = ".parquet files with a column messages or conversations, or columns prompt and completion"
    options_class = ConversationOptions
    rendering = Rendering()

    @property
    def masked(self) -> bool:
        """Whether the documents have spans: yes, of what the assistant says."""
        return True

    def select_columns(self, columns: set[str]) -> list[str]:
        """Return the columns of the first layout that the file has, of `messages` if it has none."""
        layouts = (*((name,) for name in _TURN_LISTS), _COMPLETION)
        return list(next((layout for layout in layouts if columns.issuperset(layout)), layouts[0]))

    def make_row(self, name: str, record: dict[str, Any]) -> Document | LayoutMismatch:
        """Return the document of one row."""
        return make_conversation(name, record, self.rendering)


def make_conversation(name: str, record: Any, rendering: Rendering) -> Document | LayoutMismatch:
    """Return the document of a conversation, or what is wrong with it.

    Args:
        name: name of the document.
        record: the record as JSON has it.
        rendering: how it becomes text.
    """
    try:
        turns = list_turns(record)
        if turns is None:
            return LayoutMismatch(name, describe_record(record))
        check_turns(turns)
        return _render(name, turns, rendering)
    except MalformedConversation as error:
        size = len(json.dumps(record, ensure_ascii=False, default=str))
        return Document(name, None, problem=str(error), lost_bytes=size, malformed=error.reason)


def list_turns(record: Any) -> list[Turn] | None:
    """Return the turns of a record; None if it has another layout.

    Raises:
        MalformedConversation: it has the layout, but not its contents.
    """
    if not isinstance(record, Mapping):
        return None
    for key, fields in _TURN_LISTS.items():
        if key in record:
            turns = record[key]
            if not isinstance(turns, list) or not turns:
                raise MalformedConversation("no turns", f"{key!r} is {'empty' if turns == [] else _type_of(turns)}")
            return [_read_turn(f"{key}[{number}]", turn, *fields) for number, turn in enumerate(turns)]
    if not all(key in record for key in _COMPLETION):
        return None
    contents = [_read_content(key, record[key]) for key in _COMPLETION]
    return [Turn(role, content) for role, content in zip(("user", "assistant"), contents, strict=True)]


def _read_turn(place: str, turn: Any, role_field: str, content_field: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise MalformedConversation("fields missing", f"{place} is {_type_of(turn)}")
    role = turn.get(role_field)
    if any(turn.get(key) for key in ("tool_calls", "function_call")) or role in _TOOL_ROLES:
        raise MalformedConversation("tool calls", f"{place} calls a tool or answers as one")
    missing = next((field for field in (role_field, content_field) if turn.get(field) is None), None)
    if missing is not None:
        raise MalformedConversation("fields missing", f"{place} has no {missing!r}")
    if not isinstance(role, str) or role not in _ROLES:
        raise MalformedConversation("unknown role", f"{place} is of {str(role)[:40]!r}")
    return Turn(_ROLES[role], _read_content(place, turn[content_field]))


def _read_content(place: str, content: Any) -> str:
    if isinstance(content, list) and content:
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        content = None if any(not isinstance(text, str) for text in texts) else "".join(texts)  # type: ignore[arg-type]
        if content is None:
            raise MalformedConversation("content is no text", f"{place} has a part that is no text")
    if not isinstance(content, str):
        raise MalformedConversation("content is no text", f"{place} is {_type_of(content)}")
    if not content.strip():
        raise MalformedConversation("empty turn", f"{place} is empty")
    return content


def check_turns(turns: list[Turn]) -> None:
    """Check that after at most one text of the system, user and assistant take turns, and the assistant is the last.

    Raises:
        MalformedConversation: they do not.
    """
    if all(turn.role != "assistant" for turn in turns):
        raise MalformedConversation(
            "no assistant turn", f"only {', '.join(dict.fromkeys(turn.role for turn in turns))}"
        )
    before = "the beginning"
    for number, turn in enumerate(turns):
        allowed = {"the beginning": ("system", "user"), "system": ("user",), "user": ("assistant",)}
        if turn.role not in allowed.get(before, ("user",)):
            raise MalformedConversation("roles out of order", f"turn {number}: {turn.role} after {before}")
        before = turn.role
    if before != "assistant":
        raise MalformedConversation("no last answer", f"the last turn is of the {before}")


def _render(name: str, turns: list[Turn], rendering: Rendering) -> Document:
    try:
        pieces = _load_template(rendering).render([turn._asdict() for turn in turns])
    except ValueError as error:
        raise MalformedConversation("refused by the template", str(error)) from error
    if pieces and pieces[0].special and pieces[0].text == DOCUMENT_TOKEN:
        # Every document begins with it.
        pieces = pieces[1:]
    if any(piece.special and piece.text == DOCUMENT_TOKEN for piece in pieces):
        raise MalformedConversation("refused by the template", f"it writes {DOCUMENT_TOKEN} within the conversation")
    place = 0
    spans: list[Span] = []
    marks: list[Span] = []
    for piece in pieces:
        span = Span(place, place + len(piece.text))
        place = span.stop
        if piece.special:
            marks.append(span)
        if piece.generated and spans and spans[-1].stop == span.start:
            spans[-1] = Span(spans[-1].start, span.stop)
        elif piece.generated:
            spans.append(span)
    if not spans:
        raise MalformedConversation("nothing to learn", "the template marks nothing of it as the assistant's")
    text = "".join(piece.text for piece in pieces)
    document = make_document(name, text, spans=tuple(spans))
    if document.text is None:
        raise MalformedConversation("not Unicode", document.problem)
    return document._replace(marks=tuple(marks))


@cache
def _load_template(rendering: Rendering) -> ChatTemplate:
    return ChatTemplate(rendering.template, DOCUMENT_TOKEN, rendering.special_tokens)


def _type_of(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
