"""Conversations by the chat template of a model file, in Jinja, rendered where it can do no harm."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.runtime.server.plain_format import CHECKPOINT_MIN_TOKENS, Prompt
from kabrn_dist.runtime.server.request_fields import ChatMessage
from kabrn_dist.utils.errors import UserError

try:
    from jinja2 import TemplateError

    from kabrn_dist.data.chat_template import compile_template
except ImportError as error:
    raise UserError(
        "the model's chat template needs jinja2, which is not installed; use: pip install jinja2"
    ) from error


class TemplateFormat:
    """The format of models with a chat template.

    Special tokens are recognized in the template's own text, and never in what somebody says.

    Args:
        model: Whose template and tokens are wanted.

    Raises:
        UserError: for a template that is none.
    """

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        document = model.token_bytes(model.info.document_token).decode(errors="replace")
        try:
            self._template = compile_template(model.template, document)
        except TemplateError as error:
            raise UserError(f"the file's chat template is no Jinja ({error}); pack it with another one") from error
        self._stops = self._find_stops()

    def build(self, messages: Sequence[ChatMessage]) -> Prompt:
        """Return what the model reads before it answers.

        Raises:
            RequestError: if the template refuses the conversation.
        """
        ids = self._tokenize(messages, True)
        return Prompt(
            ids, self._find_marks(messages, ids), self._stops, False, lambda text: self._follow(messages, text)
        )

    def _follow(self, messages: Sequence[ChatMessage], text: str) -> list[int]:
        return self._tokenize([*messages, ChatMessage("assistant", text)], False)

    def _render(self, messages: Sequence[ChatMessage], ask: bool) -> str:
        said = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=said, add_generation_prompt=ask)
        except Exception as error:  # a template may fail in any way that Python can
            raise RequestError(
                f"messages: the model's chat template refuses them ({str(error)[:200]})", "messages"
            ) from error

    def _tokenize(self, messages: Sequence[ChatMessage], ask: bool) -> list[int]:
        """Tokens of the rendered conversation; what looks like a special token in a content stays text."""
        sentinel = f"\ue000{secrets.token_hex(8)}\ue001"
        contents, hidden = [], []
        for message in messages:
            if self._has_special(message.content):
                hidden.append(message.content)
                message = ChatMessage(message.role, sentinel)  # noqa: PLW2901
            contents.append(message)
        pieces = self._render(contents, ask).split(sentinel)
        if len(pieces) != len(hidden) + 1:
            raise RequestError("messages: the chat template cannot hold the texts of special tokens", "messages")
        ids = self._model.tokenize(pieces[0], special=True)
        for content, piece in zip(hidden, pieces[1:], strict=True):
            ids += self._model.tokenize(content) + self._model.tokenize(piece, special=True)
        document_token = self._model.info.document_token
        return ids if ids[:1] == [document_token] else [document_token, *ids]

    def _has_special(self, text: str) -> bool:
        return self._model.tokenize(text, special=True) != self._model.tokenize(text)

    def _find_marks(self, messages: Sequence[ChatMessage], ids: list[int]) -> tuple[int, ...]:
        """Where the texts of the system end, if the template can be asked for them alone."""
        count = next((number for number, message in enumerate(messages) if message.role != "system"), len(messages))
        if not count:
            return ()
        try:
            system = self._tokenize(messages[:count], False)
        except RequestError:
            return ()
        same = next((at for at, pair in enumerate(zip(system, ids, strict=False)) if pair[0] != pair[1]), len(system))
        same = min(same, len(ids))
        return (same,) if same >= CHECKPOINT_MIN_TOKENS else ()

    def _find_stops(self) -> tuple[str, ...]:
        """What the template writes after an answer: where the model has no special token for it, it writes that too."""
        marks = [f"\ue000{name}\ue001" for name in "abc"]
        turns = [ChatMessage(role, mark) for role, mark in zip(("user", "assistant", "user"), marks, strict=True)]
        stops = []
        for count in (2, 3):
            try:
                after = self._render(turns[:count], False).partition(marks[1])[2].partition(marks[2])[0]
            except RequestError:
                continue
            if after.strip():
                stops.append(after.strip() if count == 2 else after.rstrip())
                break
        return tuple(stops)
