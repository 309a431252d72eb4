"""Encode texts as tokens, with loss masks for questions and answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
        self._lengths = tokenizer.bytes_per_token()

    def encode(self, documents: Iterable[StoredDocument]) -> Iterator[TokenizedDocument]:
        """Yield each document with the document token in front, which carries loss: it ends the document before.

        A token carries loss if one of its bytes lies in a span of the document.

        Raises:
            UserError: the tokens of a document are not its text.
        """
        for batch in _batched(documents):
            encoded = self._tokenizer.encode_batch([document.text.decode() for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                if self._checked and self._tokenizer.decode_bytes(ids) != document.text:
                    raise UserError(
                        f"{document.name}: the tokenizer does not give back this text as it is, so it changes texts; "
                        "use a plain byte-level BPE, or let data_prep train one"
                    )
                tokens = np.empty(len(ids) + 1, self._dtype)
                tokens[0] = self._tokenizer.document_token
                tokens[1:] = ids
                yield TokenizedDocument(
                    tokens, None if document.spans is None else self.loss_mask(tokens, document.spans)
                )

    def loss_mask(self, tokens: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Return which of a document's tokens carry loss.

        Args:
            tokens: ids [tokens], the document token first.
            spans: the bytes of its text that carry loss, int64 [n, 2].

        Returns:
            bool [tokens].
        """
        ends = np.cumsum(self._lengths[tokens])
        starts = ends - self._lengths[tokens]
        mask = np.zeros(len(tokens), bool)
        for start, stop in spans:
            mask |= (starts < stop) & (ends > start)
        mask[0] = True
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
