"""Conversations as tokens: by the tokenizer's chat template, or without one as the runtime in C writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kabrn_dist.data.chat_template import ChatTemplate, Piece
from kabrn_dist.data.default_template import find_chat_template
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.errors import UserError

# As in runtime/csrc/mixkabrn.c.
USER_LABEL, ASSISTANT_LABEL = "User:", "Assistant:"

Message = Mapping[str, str]


class Tokens(NamedTuple):
    """Tokens of a text, the document token first.

    Attributes:
        ids: Their ids.
        learned: Whether each of them carries loss.
    """

    ids: list[int]
    learned: list[bool]

    def add(self, ids: Sequence[int], learned: bool = False) -> None:
        """Append tokens."""
        self.ids.extend(ids)
        self.learned.extend([learned] * len(ids))


class ChatWriter:
    """Writes conversations as a model was trained to read them.

    Args:
        tokenizer: The model's tokenizer, with its chat template if it has one.

    Attributes:
        stops: Strings that end an answer, where no special token does.
        trim: Whether white space at the beginning of an answer is left out.

    Raises:
        UserError: for a template that is none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.special_tokens.values())
        self._document = tokenizer.decode([tokenizer.document_token])
        self._template: ChatTemplate | None = None
        self.stops: tuple[str, ...] = (f"\n{USER_LABEL}",)
        self.trim = True
        text = find_chat_template(tokenizer)
        if text:
            try:
                template = ChatTemplate(text, self._document, tuple(tokenizer.special_tokens))
            except ValueError as error:
                raise UserError(f"the chat template {error}; restore chat_template.jinja") from error
            self._template, self.trim = template, False
            self.stops = self._find_stops(template)

    def write(self, messages: Sequence[Message], ask: bool = False) -> Tokens:
        """Return the tokens of a conversation; what the assistant says carries loss, with what ends it.

        Args:
            messages: Role and content of each turn.
            ask: Whether the beginning of an answer follows.

        Raises:
            UserError: if the template refuses the conversation.
        """
        if self._template is None:
            return self._write_plain(messages, ask)
        try:
            pieces = self._template.render(messages, ask)
        except ValueError as error:
            raise UserError(f"the model's chat template refuses the conversation ({error})") from error
        if pieces and pieces[0].special and pieces[0].text == self._document:
            pieces = pieces[1:]
        tokens = Tokens([self._tokenizer.document_token], [False])
        stretch: list[Piece] = []
        for piece in pieces:
            if piece.special:
                self._add_stretch(tokens, stretch)
                tokens.add([self._tokenizer.special_tokens[piece.text]], piece.generated)
                stretch = []
            else:
                stretch.append(piece)
        self._add_stretch(tokens, stretch)
        return tokens

    def ends(self, id: int) -> bool:
        """Return whether a token ends an answer: it is that of the document, or another special one."""
        return id in self._special_ids

    def _add_stretch(self, tokens: Tokens, stretch: Sequence[Piece]) -> None:
        """Append what stands between special tokens; a token in two pieces carries loss if one of them does."""
        learned = b"".join(bytes([piece.generated]) * len(piece.text.encode()) for piece in stretch)
        place = 0
        for id in self._tokenizer.encode("".join(piece.text for piece in stretch)):
            size = len(self._tokenizer.token_bytes(id))
            tokens.add([id], any(learned[place : place + size]))
            place += size

    def _write_plain(self, messages: Sequence[Message], ask: bool) -> Tokens:
        """Its pieces become tokens one by one, so that a longer conversation begins with those of a shorter one."""
        encode = self._tokenizer.encode
        tokens, lead = Tokens([self._tokenizer.document_token], [False]), ""
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                tokens.add(encode(f"{content}\n\n"))
                continue
            answer = message["role"] == "assistant"
            # What follows an answer ends it, so it is learned with it.
            tokens.add(encode(lead + (ASSISTANT_LABEL if answer else USER_LABEL)), bool(lead) and not answer)
            tokens.add(encode(f" {content}") if content else [], answer)
            lead = "\n"
        if ask:
            tokens.add(encode(lead + ASSISTANT_LABEL))
        elif messages and messages[-1]["role"] == "assistant":
            tokens.add(encode(f"\n{USER_LABEL}"), True)
        return tokens

    def _find_stops(self, template: ChatTemplate) -> tuple[str, ...]:
        """What the template writes after an answer: a model without a special token for it writes that too."""
        marks = [f"\ue000{name}\ue001" for name in "ab"]
        said = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant"), marks, strict=True)]
        try:
            written = "".join(piece.text for piece in template.render(said))
        except ValueError as error:
            raise UserError(f"the model's chat template cannot write a conversation ({error})") from error
        after = written.partition(marks[1])[2].strip()
        return (after,) if after else ()
