"""Tokenizers, text ↔ token ids: byte-level BPE from a `tokenizer.json`, or the bare bytes."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from kabrn_dist.data.index import CHAT_TEMPLATE_NAME, TOKENIZER_NAME, Index
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

DOCUMENT_TOKEN = "<|document|>"
# Vocabularies of a million tokens take a tenth of it.
TOKENIZER_BYTES_LIMIT = 1 << 29
TEMPLATE_BYTES_LIMIT = 1 << 20

_BYTES_CONTENT = b'{"kind": "bytes"}\n'
# Text that careless tokenizers change: capitals, composed letters, blanks, line ends, NUL, the name of a special token.
_PROBE = f"a  B\t\r\n\x00 é e\u0301 ﬁ 漢 😀👩\u200d💻 {DOCUMENT_TOKEN} "


class Tokenizer:
    """Lossless map from any text to token ids and back.

    Args:
        content: Content of `tokenizer.json`.
        origin: Its name in messages.
        chat_template: The chat template that lies beside it; "" for none.

    Attributes:
        kind: "bytes" or "bpe".
        vocab_size: Number of ids.
        document_token: Id of the token that begins each document; no text is encoded to it.
        special_tokens: Ids of all special tokens by their texts; no text is encoded to one of them.
        content: Content of `tokenizer.json`.
        sha256: Hash of `content`.
        chat_template: The chat template in Jinja that lies beside it; "" for none.

    Raises:
        UserError: if `content` is not a tokenizer that this framework can use.

    Example:
        >>> tokenizer = Tokenizer.of_bytes()
        >>> tokenizer.encode("né"), tokenizer.decode([256, 110])
        ([110, 195, 169], '<|document|>n')
    """

    def __init__(self, content: bytes, origin: str = TOKENIZER_NAME, chat_template: str = "") -> None:
        self.content, self.chat_template = content, chat_template
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._token_bytes: list[bytes]
        self._bpe: tokenizers.Tokenizer | None = None
        self.kind: Literal["bytes", "bpe"] = "bytes" if _is_bytes(content, origin) else "bpe"
        if self.kind == "bytes":
            self._token_bytes = [bytes([value]) for value in range(256)] + [DOCUMENT_TOKEN.encode()]
            self.document_token = 256
            self.special_tokens = {DOCUMENT_TOKEN: 256}
        else:
            self._bpe = _parse(content, origin)
            self.document_token = next(n for n, token in _added(self._bpe).items() if token.content == DOCUMENT_TOKEN)
            self.special_tokens = {token.content: n for n, token in _added(self._bpe).items() if token.special}
            self._token_bytes = _list_token_bytes(self._bpe, origin)
        self.vocab_size = len(self._token_bytes)
        ids = self.encode(_PROBE)
        if self.decode(ids) != _PROBE or self.document_token in ids:
            raise UserError(
                f"{origin}: text does not come back unchanged (a normalizer, a prefix space, or ordinary "
                f"text that becomes {DOCUMENT_TOKEN}); use a plain byte-level BPE, or let data_prep train one"
            )

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """Return the tokenizer whose ids are the 256 byte values and 256 for the document token."""
        return cls(_BYTES_CONTENT)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a `tokenizer.json`, and the chat template beside it if there is one.

        Raises:
            UserError: if one of them cannot be read or used.
        """
        remedy = f"give a tokenizer.json that has the special token {DOCUMENT_TOKEN}"
        content = read_plain(path, TOKENIZER_BYTES_LIMIT, follow_links=True, remedy=remedy)
        template = path.parent / CHAT_TEMPLATE_NAME
        return cls(content, str(path), read_chat_template(template) if template.exists() else "")

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, byte for byte as it was loaded, and its chat template beside it if it has one.

        Raises:
            UserError: if the disk refuses.
        """
        if self.chat_template:
            atomic_write(path.parent / CHAT_TEMPLATE_NAME, self.chat_template.encode())
        atomic_write(path, self.content)

    @property
    def chat_template_sha256(self) -> str | None:
        """Hash of the chat template; None without one."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest() if self.chat_template else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of an ordinary text; no document token is added or recognized."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; BPE encodes several at once, one per processor."""
        if self._bpe is None:
            return [list(text.encode()) for text in texts]
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens appear by name, bytes that are not UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids, which need not be whole characters."""
        return b"".join([self._token_bytes[n] for n in ids])

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one id, which may be part of a character."""
        return self._token_bytes[id]

    def bytes_per_token(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of text of each id, int64 [vocab_size]; 0 for special tokens."""
        special = set(self.special_tokens.values())
        lengths = [0 if n in special else len(piece) for n, piece in enumerate(self._token_bytes)]
        return np.array(lengths, np.int64)


class StreamDecoder:
    """Decoder of ids one by one that returns only complete characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Append one id and return the characters that it completes, possibly none."""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """Return the rest: U+FFFD if the last character is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def load_folder_tokenizer(folder: Path, index: Index) -> Tokenizer:
    """Read the tokenizer of a shard folder.

    Raises:
        UserError: if it cannot be read or is not the one that made the shards.
    """
    path = folder / TOKENIZER_NAME
    return check_tokenizer(Tokenizer.load(path), index, str(path))


def check_tokenizer(tokenizer: Tokenizer, index: Index, origin: str) -> Tokenizer:
    """Return a tokenizer if it is the one that made the shards, and the index says of it what it is.

    Args:
        tokenizer: Tokenizer to check.
        index: Index of the shards.
        origin: Name of the tokenizer in messages.

    Raises:
        UserError: if it is another one, or the index contradicts it.
    """
    if tokenizer.sha256 != index.tokenizer.sha256:
        raise UserError(
            f"{origin}: sha256 is {tokenizer.sha256[:12]}…, the index says {index.tokenizer.sha256[:12]}…: "
            "this is not the tokenizer that made the shards; copy it again, or prepare the data again"
        )
    if tokenizer.chat_template_sha256 != index.tokenizer.chat_template_sha256:
        place = f"{origin.removesuffix(TOKENIZER_NAME)}{CHAT_TEMPLATE_NAME}"
        raise UserError(
            f"{place}: not the chat template that made the shards; copy it again, or prepare the data again"
        )
    for key, ours, theirs in (
        ("tokenizer.kind", index.tokenizer.kind, tokenizer.kind),
        ("vocabulary", index.vocabulary, tokenizer.vocab_size),
        ("document_token", index.document_token, tokenizer.document_token),
    ):
        if ours != theirs:
            raise UserError(
                f"{origin}: the index says {key} {ours}, its tokenizer has {theirs}, so the index is wrong; copy "
                "index.json again, or prepare the data again"
            )
    return tokenizer


def read_chat_template(path: Path) -> str:
    """Read a chat template in Jinja, without checking it.

    Raises:
        UserError: if it cannot be read or is empty.
    """
    content = read_plain(path, TEMPLATE_BYTES_LIMIT, follow_links=True, remedy="name a chat template in Jinja")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; name a chat template in Jinja") from None
    if not text.strip():
        raise UserError(f"{path}: is empty; name a chat template in Jinja, or leave it out")
    return text


def _is_bytes(content: bytes, origin: str) -> bool:
    try:
        return bool(json.loads(content) == {"kind": "bytes"})
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not JSON ({error}); give a tokenizer.json") from error


def _parse(content: bytes, origin: str) -> tokenizers.Tokenizer:
    try:
        bpe = tokenizers.Tokenizer.from_str(content.decode())
    # The library raises bare Exception for everything it cannot parse.
    except Exception as error:
        raise UserError(
            f"{origin}: not a tokenizer.json of Hugging Face tokenizers ({error}); let data_prep train one"
        ) from error
    if not any(token.special and token.content == DOCUMENT_TOKEN for token in _added(bpe).values()):
        raise UserError(
            f"{origin}: no special token {DOCUMENT_TOKEN}; add it to the tokenizer, or let data_prep train one"
        )
    _check_deterministic_and_lossless(bpe, origin)
    bpe.no_truncation()
    bpe.no_padding()
    # Text that spells a special token stays text.
    bpe.encode_special_tokens = True
    return bpe


def _check_deterministic_and_lossless(bpe: tokenizers.Tokenizer, origin: str) -> None:
    dropout = getattr(bpe.model, "dropout", None)
    if dropout:
        raise UserError(
            f"{origin}: model.dropout is {dropout:g}, with which a text has other tokens each time; set it to null"
        )
    for token in _added(bpe).values():
        # Special tokens are not recognized in texts.
        if token.special:
            continue
        # Without a normalizer the last flag changes nothing.
        flags = ["lstrip", "rstrip", "single_word", *(["normalized"] if bpe.normalizer is not None else [])]
        wrong = [flag for flag in flags if getattr(token, flag)]
        if wrong:
            raise UserError(
                f"{origin}: the added token {token.content!r} has {', '.join(wrong)}, with which it changes the text "
                "around it; set that to false, or let data_prep train a tokenizer"
            )


def _added(bpe: tokenizers.Tokenizer) -> dict[int, tokenizers.AddedToken]:
    return dict(bpe.get_added_tokens_decoder())


def _list_token_bytes(bpe: tokenizers.Tokenizer, origin: str) -> list[bytes]:
    added = {number: token.content.encode() for number, token in _added(bpe).items()}
    value_of = byte_level_alphabet()
    pieces: list[bytes] = [b""] * (max(bpe.get_vocab(with_added_tokens=True).values()) + 1)
    for token, number in bpe.get_vocab(with_added_tokens=True).items():
        if number in added:
            pieces[number] = added[number]
        elif all(letter in value_of for letter in token):
            pieces[number] = bytes(value_of[letter] for letter in token)
        else:
            raise UserError(f"{origin}: token {token!r} is not byte-level; use a byte-level BPE tokenizer")
    missing = 256 - len({piece for piece in pieces if len(piece) == 1})
    if missing:
        raise UserError(f"{origin}: {missing} of the 256 bytes have no token; use a complete byte-level BPE tokenizer")
    return pieces


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each letter of byte-level BPE: printable Latin-1 itself, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    letters = {chr(value): value for value in printable}
    return letters | {chr(0x100 + number): value for number, value in enumerate(others)}
