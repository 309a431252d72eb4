"""What a model reads before it answers a conversation without a chat template: as the C program's `chat` writes it.

Special tokens are not recognized in it:

    System text.

    User: What one says
    Assistant: What the model says
    User: …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.runtime.server.request_fields import ChatMessage

# As in csrc/mixkabrn.c.
USER_PREFIX, ASSISTANT_PREFIX = "User:", "Assistant:"
# A shorter beginning is read again as fast as its state is restored.
CHECKPOINT_MIN_TOKENS = 16


@dataclass(frozen=True)
class Prompt:
    """What the model reads before it answers.

    Attributes:
        ids: Tokens, with that of the document.
        marks: Numbers of first tokens that other conversations may begin with too.
        stops: Strings that end the answer.
        trim: Whether white space at the beginning of the answer is left out.
        follow: From the answer's text to the tokens of the conversation with it, up to where the next text begins; None
            if nothing follows.
    """

    ids: list[int]
    marks: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    trim: bool = False
    follow: Callable[[str], list[int]] | None = None


class PlainFormat:
    """The format of models without a chat template.

    Its pieces become tokens one by one, so that a longer conversation begins with the tokens of a shorter one.

    Args:
        model: Whose tokens are wanted.
    """

    def __init__(self, model: NativeModel) -> None:
        self._model = model

    def build(self, messages: Sequence[ChatMessage]) -> Prompt:
        """Return what the model reads before it answers.

        Raises:
            RequestError: for a text of the system after the beginning.
        """
        ids, lead = [self._model.info.document_token], ""
        marks: tuple[int, ...] = ()
        for number, message in enumerate(messages):
            if message.role == "system":
                if lead:
                    place = f"messages[{number}].role"
                    raise RequestError(f"{place}: a text of the system must come before all others", place)
                ids += self._model.tokenize(f"{message.content}\n\n")
                marks = (len(ids),) if len(ids) >= CHECKPOINT_MIN_TOKENS else ()
                continue
            prefix = USER_PREFIX if message.role == "user" else ASSISTANT_PREFIX
            ids += self._model.tokenize(lead + prefix) + self._tokenize_content(message.content)
            lead = "\n"
        ids += self._model.tokenize(lead + ASSISTANT_PREFIX)
        return Prompt(ids, marks, (f"\n{USER_PREFIX}",), True, lambda text: self._follow(ids, text))

    def _follow(self, ids: list[int], text: str) -> list[int]:
        return ids + self._tokenize_content(text) + self._model.tokenize(f"\n{USER_PREFIX}")

    def _tokenize_content(self, content: str) -> list[int]:
        # Most vocabularies have words with the space in front of them.
        return self._model.tokenize(f" {content}") if content else []
