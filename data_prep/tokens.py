"""Texts → tokens, with the loss masks of questions and answers; and the sample that a tokenizer is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from data_prep.shards import TokenizedDocument
from data_prep.sorted_runs import StoredDocument
from kabrn_dist.data.index import dtype_for
from kabrn_dist.data.tokenizer import Tokenizer

# Bytes of text handed to the tokenizer at once: enough to keep all processors busy. Tokens take many times that.
_BATCH_BYTES = 1 << 20


class DocumentEncoder:
    """Turns stored documents into tokens, in order."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype_for(tokenizer.vocab_size))
        self._lengths = tokenizer.bytes_per_token()

    def encode(self, documents: Iterable[StoredDocument]) -> Iterator[TokenizedDocument]:
        """Yield each document with the document token in front, which counts as a target: the end of the one before.

        A token carries loss when a byte of it lies in one of the document's spans.
        """
        for batch in _batched(documents):
            found = self._tokenizer.encode_batch([document.text.decode() for document in batch])
            for document, ids in zip(batch, found, strict=True):
                tokens = np.empty(len(ids) + 1, self._dtype)
                tokens[0] = self._tokenizer.document_token
                tokens[1:] = ids
                yield TokenizedDocument(
                    tokens, None if document.spans is None else self.loss_mask(tokens, document.spans)
                )

    def loss_mask(self, tokens: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """Which of a document's `tokens` carry loss, bool [tokens]. `spans`: bytes of its text, int64 [n, 2]."""
        ends = np.cumsum(self._lengths[tokens])
        starts = ends - self._lengths[tokens]
        use = np.zeros(len(tokens), bool)
        for start, stop in spans:
            use |= (starts < stop) & (ends > start)
        use[0] = True
        return use


def loss_mask_naive(tokenizer: Tokenizer, ids: list[int], text: str, spans: Iterable[tuple[int, int]]) -> list[bool]:
    """`Encoder.mask` byte by byte, from spans in characters: what it must agree with. `ids` without document token."""
    carries = bytearray()
    for place, character in enumerate(text):
        carries += bytes([any(start <= place < stop for start, stop in spans)]) * len(character.encode())
    use, at = [True], 0
    for id in ids:
        size = len(tokenizer.token_bytes(id))
        use.append(any(carries[at : at + size]))
        at += size
    return use


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
