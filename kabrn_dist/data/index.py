"""The shard-set format: `index.json` describes tar shards that plain WebDataset reads, source by source.

A shard is a tar of blocks; block 123 is the members `000123.len` (uint32 document lengths, in tokens), in sources with
a loss mask `000123.use` (a bit for each token, the lowest first: 1 where the token counts in the loss as a target), and
`000123.tok` (the tokens of those documents, one after another). All numbers are little-endian. Every document begins
with the document token. The index is written last: a folder without one is not a data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from kabrn_dist.utils.errors import UserError

INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "validation")

SplitName = Literal["train", "validation"]
Dtype = Literal["uint16", "uint32"]
Scalar = str | int | float | bool | None
Option = Scalar | tuple[Scalar, ...]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Record):
    """One tar.

    `blocks`, in file order: byte offset of the raw tokens in the tar, number of tokens, byte offset of the loss mask or
    0 without one.
    """

    name: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    blocks: tuple[tuple[int, int, int], ...]


class Split(_Record):
    """The shards of one split of one source, in stream order, and their totals.

    `text_bytes` counts the UTF-8 bytes of the texts. `gzip9_bytes` is the size of the concatenated
    texts as one gzip file at zlib's level 9 (validation only): the yardstick a model's bits per byte are held
    against. The gzip program itself comes out some 0.2 % smaller. `loss_tokens` are those that count as targets: all of
    them without a mask.
    """

    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    text_bytes: int
    gzip9_bytes: int | None = None
    loss_tokens: int


class TokenizerInfo(_Record):
    """Which tokenizer made the tokens; `sha256` is that of `tokenizer.json` beside the index."""

    kind: Literal["bytes", "bpe"]
    sha256: str


class Source(_Record):
    """Texts of one origin.

    `kind` and `options` say how they were read. `weight` is the source's share of the training sequences against the
    other sources', `epochs` after how many passes it is drawn from no more (None: never). `masked`: its blocks have
    loss masks.
    """

    name: str
    kind: str
    options: dict[str, Option]
    weight: float
    epochs: float | None
    masked: bool
    train: Split
    validation: Split

    def split(self, name: SplitName) -> Split:
        """Return one split. Raises UserError when `name` is neither "train" nor "validation"."""
        if name not in SPLITS:
            raise UserError(f"split: there is no {name!r}; use one of {', '.join(SPLITS)}.")
        return self.train if name == "train" else self.validation


class Index(_Record):
    """The whole of `index.json`. `fingerprint` is empty until `write_index` fills it in.

    `recipe` holds whatever else decides about the bytes: cleaning, the share of validation, seeds.
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
        """Bytes a token takes on disk."""
        return 2 if self.dtype == "uint16" else 4

    def source(self, name: str) -> Source:
        """Return the source of that name. Raises UserError, listing those there are, when there is none."""
        for source in self.sources:
            if source.name == name:
                return source
        raise UserError(f"source: there is no {name!r}; there are {', '.join(s.name for s in self.sources)}.")

    def shards(self) -> Iterator[Shard]:
        """All shards, source by source, training before validation."""
        for source in self.sources:
            yield from (*source.train.shards, *source.validation.shards)

    def tokens(self, split: SplitName) -> int:
        """Tokens of a split, over all sources."""
        return sum(source.split(split).tokens for source in self.sources)

    def documents(self, split: SplitName) -> int:
        """Documents of a split, over all sources."""
        return sum(source.split(split).documents for source in self.sources)

    def text_bytes(self, split: SplitName) -> int:
        """UTF-8 bytes of a split's texts, over all sources."""
        return sum(source.split(split).text_bytes for source in self.sources)

    def gzip9_bytes(self, split: SplitName) -> int:
        """What gzip makes of a split's texts, source by source; 0 where no source says."""
        return sum(source.split(split).gzip9_bytes or 0 for source in self.sources)


def dtype_for(vocab_size: int) -> Dtype:
    """Return the narrowest type on disk that holds every id below `vocabulary`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"
