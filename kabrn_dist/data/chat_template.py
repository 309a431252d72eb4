"""Chat templates in Jinja: conversations as text, in a sandbox. Needs jinja2, and neither numpy nor torch.

As in transformers, `{% generation %}…{% endgeneration %}` marks what the assistant writes, which is what carries loss.
A template lies as `chat_template.jinja` beside the `tokenizer.json` that it belongs to.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MARK = re.compile(r"<\|[^|\s<>]{1,60}\|>")
_GENERATION_CALL = "_mark_generation"
_ROLES = ("user", "assistant", "user")


class Piece(NamedTuple):
    """A stretch of a conversation that a template has written.

    Attributes:
        text: The text, never "".
        special: Whether it is a special token that the template wrote.
        generated: Whether the assistant writes it.
    """

    text: str
    special: bool
    generated: bool


class ChatTemplate:
    """A chat template that is ready to render.

    Args:
        text: The template.
        document: Text of the document token, for `bos_token` and `eos_token`.
        special_tokens: Texts of the special tokens of the tokenizer.

    Raises:
        ValueError: for a text that is no Jinja; the message says why.
    """

    def __init__(self, text: str, document: str, special_tokens: Collection[str] = ()) -> None:
        self._marker = _Marker()
        try:
            self._template = compile_template(text, document, self._marker)
        except TemplateError as error:
            raise ValueError(f"is no Jinja ({_in_one_line(error)})") from error
        # Of two tokens of which one begins with the other, the longer one is meant.
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> list[Piece]:
        """Return a conversation in pieces, whose texts one after another are what the template writes.

        Special tokens are those that the template writes: what somebody says stays text.

        Args:
            messages: Role and content of each turn.
            add_generation_prompt: Whether the beginning of an answer follows.

        Raises:
            ValueError: if the template refuses the conversation; the message says why.
        """
        key = secrets.token_hex(8)
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"\ue000{key}:{len(hidden) - 1}\ue001"

        said = [
            {name: self._special.sub(hide, value) if isinstance(value, str) else value for name, value in each.items()}
            for each in messages
        ]
        self._marker.key = key
        try:
            written = self._template.render(messages=said, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template may fail in any way that Python can
            raise ValueError(_in_one_line(error)) from error
        finally:
            self._marker.key = ""
        return self._divide(written, key, hidden)

    def _divide(self, written: str, key: str, hidden: Sequence[str]) -> list[Piece]:
        """Return the pieces of a rendered text: its parts between the edges of generation and special tokens."""
        pieces: list[Piece] = []
        depth = 0

        def add(text: str, special: bool) -> None:
            last = pieces[-1] if pieces else None
            if last and not special and not last.special and last.generated == (depth > 0):
                pieces[-1] = last._replace(text=last.text + text)
            elif text:
                pieces.append(Piece(text, special, depth > 0))

        # Odd parts are what stands between the two letters that only markers have.
        for number, part in enumerate(re.split(f"\ue000{key}:(\\d+|begin|end)\ue001", written)):
            if number % 2 == 0:
                place = 0
                for match in self._special.finditer(part):
                    add(part[place : match.start()], False)
                    add(match[0], True)
                    place = match.end()
                add(part[place:], False)
            elif part in ("begin", "end"):
                depth += 1 if part == "begin" else -1
            else:
                add(hidden[int(part)], False)
        return pieces


class _Marker:
    """Writes around the assistant's words while `key` is set, with letters that no text holds by accident."""

    def __init__(self) -> None:
        self.key = ""

    def __call__(self, caller: Callable[[], str]) -> str:
        words = caller()
        return f"\ue000{self.key}:begin\ue001{words}\ue000{self.key}:end\ue001" if self.key else words


class _Generation(Extension):
    """The block `{% generation %}…{% endgeneration %}`."""

    tags = {"generation"}  # noqa: RUF012 - the library declares it so

    def parse(self, parser: Parser) -> Node:
        """Return a call of the marker with the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method(_GENERATION_CALL), [], [], body).set_lineno(line)

    def _mark_generation(self, caller: Callable[[], str]) -> str:
        marker = self.environment.globals.get(_GENERATION_CALL)
        return marker(caller) if isinstance(marker, _Marker) else caller()


def compile_template(text: str, document: str, marker: _Marker | None = None) -> Template:
    """Return a template that is ready to render.

    Args:
        text: The template.
        document: Text of the document token, for `bos_token` and `eos_token`.
        marker: Writes around what is generated; None: nothing does.

    Raises:
        TemplateError: for a text that is no Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _dump_json
    environment.globals |= {"raise_exception": _raise_exception, "bos_token": document, "eos_token": document}
    if marker is not None:
        environment.globals[_GENERATION_CALL] = marker
    return environment.from_string(text)


def list_marks(text: str) -> tuple[str, ...]:
    """Return the marks `<|…|>` in a template, each once, which a tokenizer may have as special tokens.

    Example:
        >>> from kabrn_dist.data.default_template import DEFAULT_TEMPLATE
        >>> list_marks(DEFAULT_TEMPLATE)
        ('<|im_start|>', '<|im_end|>')
    """
    return tuple(dict.fromkeys(_MARK.findall(text)))


def check_chat_template(text: str) -> None:
    """Return if a template writes a conversation of two turns, with all that was said.

    Raises:
        ValueError: if it does not; the message says why.
    """
    written, said = _write_example(ChatTemplate(text, "<|endoftext|>"))
    whole = "".join(piece.text for piece in written)
    if not all(content in whole for content in said):
        raise ValueError("leaves out what was said; a chat template writes the content of each of `messages`")


def check_training_template(text: str, document: str, special_tokens: Collection[str]) -> None:
    """Return if a template can write conversations to train on.

    Args:
        text: The template.
        document: Text of the document token.
        special_tokens: Texts of the special tokens of the tokenizer.

    Raises:
        ValueError: if it cannot; the message says why.
    """
    check_chat_template(text)
    written, said = _write_example(ChatTemplate(text, document, special_tokens), count=2)
    generated = "".join(piece.text for piece in written if piece.generated)
    if said[1] not in generated:
        raise ValueError(
            "does not mark what the assistant says; write {% generation %}{{ message.content }}{% endgeneration %}"
        )
    if said[0] in generated:
        raise ValueError("marks what the user says as generation; only what the assistant writes is to be learned")
    if generated.endswith(said[1]):
        raise ValueError(
            "does not mark what ends an answer, so a model would not learn to stop; write it before {% endgeneration %}"
        )
    if any(piece.special and piece.text == document for piece in written[1:]):
        raise ValueError(
            f"writes {document} within a conversation, which begins a document and forgets all before; end turns with "
            "a mark of their own, such as <|im_end|>"
        )


def _write_example(template: ChatTemplate, count: int = 3) -> tuple[list[Piece], list[str]]:
    """Return a conversation of `count` turns as a template writes it, and what is said in it."""
    said = [f"{role} {secrets.token_hex(8)}" for role in _ROLES[:count]]
    messages = [{"role": role, "content": content} for role, content in zip(_ROLES, said, strict=False)]
    try:
        return template.render(messages, add_generation_prompt=count % 2 == 1), said
    except ValueError as error:
        raise ValueError(f"cannot write a conversation of two turns ({error})") from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _dump_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own would escape for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
