"""Prompts, contexts and continuations as tokens, for every kind of model; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kabrn_dist.evaluation.requests import ContinuationRequest
from kabrn_dist.utils.errors import UserError

# A shorter beginning in common is not worth a call of its own.
LEAST_COMMON_TOKENS = 8


class TextEncoder(Protocol):
    """What is needed of a tokenizer.

    Attributes:
        document_token: Id of the token that begins each document.
        vocab_size: Number of ids.
    """

    document_token: int
    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one id, which may be part of a character."""


class SplitTokens(NamedTuple):
    """Tokens of a context and its continuation.

    Attributes:
        context: Tokens before the continuation, the document token first.
        continuation: At least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def prompt_tokens(tokenizer: TextEncoder, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of texts at the beginning of a document each, the document token in front."""
    return [[tokenizer.document_token, *ids] for ids in tokenizer.encode_batch(texts)]


def split_tokens(tokenizer: TextEncoder, requests: Sequence[ContinuationRequest]) -> list[SplitTokens]:
    """Encode contexts and continuations as lm-eval does, so that scores can be compared.

    White space at the end of a context goes to the continuation; both are encoded as one text, which is split after as
    many tokens as the context alone has.

    Raises:
        UserError: for a continuation without text.
    """
    if not all(request.continuation for request in requests):
        raise UserError("a continuation is empty, and has no probability; give one of at least one character")
    contexts = tokenizer.encode_batch([request.context.rstrip() for request in requests])
    wholes = tokenizer.encode_batch([request.context + request.continuation for request in requests])
    found = []
    for context, whole in zip(contexts, wholes, strict=True):
        # One token may hold the end of the context and the whole continuation.
        cut = min(len(context), len(whole) - 1)
        found.append(SplitTokens((tokenizer.document_token, *whole[:cut]), tuple(whole[cut:])))
    return found


def group_by_context(split: Sequence[SplitTokens]) -> dict[tuple[int, ...], list[int]]:
    """Return context → numbers of the continuations that follow it, the longest contexts first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, tokens in enumerate(split):
        groups.setdefault(tokens.context, []).append(number)
    return dict(sorted(groups.items(), key=lambda item: -len(item[0])))


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all rows have in common, at least one token of each row left over.

    It is 0 if there is only one row, or too little in common.
    """
    if len(rows) < 2:
        return 0
    # Whatever the least and the greatest share, all between them share.
    first, last = min(map(tuple, rows)), max(map(tuple, rows))
    most = min(len(row) for row in rows) - 1
    same = next((n for n in range(most) if first[n] != last[n]), most)
    return same if same >= LEAST_COMMON_TOKENS else 0
