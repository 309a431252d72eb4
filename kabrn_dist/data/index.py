"""Format of shard sets: `index.json` describes tar shards that plain WebDataset reads, source by source.

A shard is a tar of blocks; block 123 is the members `000123.len` (uint32 document lengths, in tokens), in sources with
a loss mask `000123.use` (a bit for each token, the lowest first: 1 where the token counts in the loss as a target), and
`000123.tok` (the tokens of those documents, one after another). All numbers are little-endian. Every document begins
with the document token. The index is written last: a folder without one is not a data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, SerializerFunctionWrapHandler, model_serializer

from kabrn_dist.utils.errors import UserError

INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
SPLITS = ("train", "validation")

SplitName = Literal["train", "validation"]
Dtype = Literal["uint16", "uint32"]
Scalar = str | int | float | bool | None
Option = Scalar | tuple[Scalar, ...]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Record):
    """One tar.

    Attributes:
        name: Name of the file.
        bytes: Size.
        sha256: Hash of the content.
        tokens: Number of tokens.
        documents: Number of documents.
        blocks: In file order: byte offset of the raw tokens in the tar, number of tokens, byte offset of the loss mask
            or 0 without one.
    """

    name: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    blocks: tuple[tuple[int, int, int], ...]


class Split(_Record):
    """The shards of one split of one source and their totals.

    Attributes:
        shards: In stream order.
        documents: Number of documents.
        tokens: Number of tokens.
        text_bytes: UTF-8 bytes of the texts.
        gzip9_bytes: Size of the concatenated texts as one gzip file at zlib's level 9 (validation only), to compare
            with a model's bits per byte. The gzip program's result is some 0.2 % smaller.
        loss_tokens: Number of tokens that carry loss as targets: all of them without a mask.
    """

    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    text_bytes: int
    gzip9_bytes: int | None = None
    loss_tokens: int


class TokenizerInfo(_Record):
    """The tokenizer that made the tokens.

    Attributes:
        kind: "bytes" or "bpe".
        sha256: Hash of `tokenizer.json` next to the index.
        chat_template_sha256: Hash of `chat_template.jinja` next to it; None without one.
    """

    kind: Literal["bytes", "bpe"]
    sha256: str
    chat_template_sha256: str | None = None

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The fingerprints of sets without conversations stay what they were before the field.
        return {key: value for key, value in serialize(self).items() if key != "chat_template_sha256" or value}


class Source(_Record):
    """Texts of one origin.

    Attributes:
        name: Unique in the set.
        kind: Kind of reader that read them.
        options: Options of that reader.
        weight: Fraction of the training sequences, relative to the weights of the other sources.
        epochs: Number of passes after which the source is exhausted; None for never.
        masked: Whether its blocks have loss masks.
        whole: Whether training keeps its documents whole in a sequence where they fit.
        train: Training split.
        validation: Validation split.
    """

    name: str
    kind: str
    options: dict[str, Option]
    weight: float
    epochs: float | None
    masked: bool
    train: Split
    validation: Split
    whole: bool = False

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key != "whole" or value}

    def split(self, name: SplitName) -> Split:
        """Return one split.

        Raises:
            UserError: if `name` is neither "train" nor "validation".
        """
        if name not in SPLITS:
            raise UserError(f"split: unknown split {name!r}; use one of {', '.join(SPLITS)}")
        return self.train if name == "train" else self.validation


class Index(_Record):
    """Content of `index.json`.

    Attributes:
        format: Version of the format.
        dtype: Type of the tokens in the shards.
        vocabulary: Number of token ids.
        document_token: Id of the token that begins each document.
        tokenizer: The tokenizer that made the tokens.
        recipe: Everything else that decides about the bytes: cleaning, the fraction of validation, seeds.
        sources: Sources of the set.
        fingerprint: Hash of the other fields; empty until `write_index` sets it.
    """

    format: Literal[2] = 2
    dtype: Dtype
    vocabulary: int
    document_token: int
    tokenizer: TokenizerInfo
    recipe: dict[str, JsonValue]
    sources: tuple[Source, ...]
    fingerprint: str = ""

    @property
    def item_bytes(self) -> int:
        """Size of a token on disk in bytes."""
        return 2 if self.dtype == "uint16" else 4

    def source(self, name: str) -> Source:
        """Return the source of a name.

        Raises:
            UserError: if there is none; the message lists the names.
        """
        for source in self.sources:
            if source.name == name:
                return source
        raise UserError(f"source: unknown source {name!r}; use one of {', '.join(s.name for s in self.sources)}")

    def shards(self) -> Iterator[Shard]:
        """Yield all shards, source by source, training before validation."""
        for source in self.sources:
            yield from (*source.train.shards, *source.validation.shards)

    def tokens(self, split: SplitName) -> int:
        """Return the number of tokens of a split, over all sources."""
        return sum(source.split(split).tokens for source in self.sources)

    def documents(self, split: SplitName) -> int:
        """Return the number of documents of a split, over all sources."""
        return sum(source.split(split).documents for source in self.sources)

    def text_bytes(self, split: SplitName) -> int:
        """Return the UTF-8 bytes of a split's texts, over all sources."""
        return sum(source.split(split).text_bytes for source in self.sources)

    def gzip9_bytes(self, split: SplitName) -> int:
        """Return the sum of the gzip sizes of a split's sources; 0 if none is recorded."""
        return sum(source.split(split).gzip9_bytes or 0 for source in self.sources)


def dtype_for(vocab_size: int) -> Dtype:
    """Return the narrowest type on disk that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"
