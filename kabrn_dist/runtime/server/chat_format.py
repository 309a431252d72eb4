"""Conversations as tokens: by the file's chat template, or plainly without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.runtime.server.plain_format import PlainFormat, Prompt
from kabrn_dist.runtime.server.request_fields import ChatMessage


class ChatFormat(Protocol):
    """How conversations become tokens."""

    def build(self, messages: Sequence[ChatMessage]) -> Prompt:
        """Return what the model reads before it answers.

        Raises:
            RequestError: for a conversation that cannot be written so.
        """


def make_chat_format(model: NativeModel) -> ChatFormat:
    """Return the format that the file asks for.

    Raises:
        UserError: for a template that is none, or if jinja2 is not installed.
    """
    if not model.template.strip():
        return PlainFormat(model)
    from kabrn_dist.runtime.server.template_format import TemplateFormat

    return TemplateFormat(model)


def build_completion(model: NativeModel, prompt: str | list[int]) -> Prompt:
    """Return what the model reads before it continues a text.

    Raises:
        RequestError: for ids that no token has.
    """
    document_token, size = model.info.document_token, model.info.tokenizer_size
    if isinstance(prompt, str):
        return Prompt([document_token, *model.tokenize(prompt)])
    wrong = next((id for id in prompt if not 0 <= id < size), None)
    if wrong is not None:
        raise RequestError(f"prompt: {str(wrong)[:20]} is no token's id; there are 0 to {size - 1}", "prompt")
    return Prompt(prompt if prompt[0] == document_token else [document_token, *prompt])
