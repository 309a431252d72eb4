"""Encode texts as tokens, with loss masks for questions and answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_prep.shards import TokenizedDocument
from data_prep.sorted_runs import StoredDocument
from kabrn_dist.data.index import dtype_for
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.errors import UserError

# Bytes of text per call of the tokenizer: enough for all processors. Its tokens take many times as much memory.
_BATCH_BYTES = 1 << 20


class DocumentEncoder:
    """Encodes stored documents, in order."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._checked = tokenizer.kind != "bytes"
        self._dtype = np.dtype(dtype_for(tokenizer.vocab_size))
        self._special = tokenizer.special_tokens
        self._lengths = np.array([len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)], np.int64)

    def encode(self, documents: Iterable[StoredDocument]) -> Iterator[TokenizedDocument]:
        """Yield each document with the document token in front, which carries loss: it ends the document before.

        A token carries loss if one of its bytes lies in a span of the document. In conversations the document token
        carries none: their template says where an answer ends.

        Raises:
            UserError: the tokens of a document are not its text.
        """
        for batch in _batched(documents):
            for document, ids in zip(batch, self._encode_batch(batch), strict=True):
                if self._checked and self._tokenizer.decode_bytes(ids) != document.text:
                    raise UserError(
                        f"{document.name}: the tokenizer does not give back this text as it is, so it changes texts; "
                        "use a plain byte-level BPE, or let data_prep train one"
                    )
                tokens = np.empty(len(ids) + 1, self._dtype)
                tokens[0] = self._tokenizer.document_token
                tokens[1:] = ids
                yield TokenizedDocument(
                    tokens,
                    None if document.spans is None else self.loss_mask(tokens, document.spans, document.marks is None),
                )

    def _encode_batch(self, documents: Sequence[StoredDocument]) -> list[list[int]]:
        """Return the ids of each document without document token; only its marks are special tokens."""
        stretches: list[str] = []
        plans: list[list[str | None]] = []
        for document in documents:
            plan: list[str | None] = []
            place = 0
            for start, stop in [] if document.marks is None else document.marks.tolist():
                plan += [None, document.text[start:stop].decode()]
                stretches.append(document.text[place:start].decode())
                place = stop
            stretches.append(document.text[place:].decode())
            plans.append([*plan, None])
        encoded = iter(self._tokenizer.encode_batch(stretches))
        return [
            [id for mark in plan for id in (next(encoded) if mark is None else [self._special[mark]])] for plan in plans
        ]

    def loss_mask(self, tokens: np.ndarray, spans: np.ndarray, first: bool = True) -> np.ndarray:
        """Return which of a document's tokens carry loss.

        Args:
            tokens: ids [tokens], the document token first.
            spans: the bytes of its text that carry loss, int64 [n, 2].
            first: whether the document token carries loss.

        Returns:
            bool [tokens].
        """
        lengths = self._lengths[tokens]
        lengths[0] = 0
        ends = np.cumsum(lengths)
        starts = ends - lengths
        mask = np.zeros(len(tokens), bool)
        for start, stop in spans:
            mask |= (starts < stop) & (ends > start)
        mask[0] = first
        return mask


def loss_mask_naive(tokenizer: Tokenizer, ids: list[int], text: str, spans: Iterable[tuple[int, int]]) -> list[bool]:
    """Compute `DocumentEncoder.loss_mask` byte by byte, from spans in characters and ids without document token."""
    carries_loss = bytearray()
    for index, character in enumerate(text):
        carries_loss += bytes([any(start <= index < stop for start, stop in spans)]) * len(character.encode())
    mask, position = [True], 0
    for id in ids:
        size = len(tokenizer.token_bytes(id))
        mask.append(any(carries_loss[position : position + size]))
        position += size
    return mask


def _batched(documents: Iterable[StoredDocument]) -> Iterator[list[StoredDocument]]:
    batch: list[StoredDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
