"""The shard-set format: `index.json` describes tar shards that plain WebDataset reads.

A shard is a tar of blocks; block 123 is the two members `000123.len` (uint32 document lengths, in tokens) and
`000123.tok` (the tokens of those documents, one after another). All numbers are little-endian. Every document
begins with the document token. The index is written last: a folder without one is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kabrn_dist.data.files import write_whole
from kabrn_dist.errors import UserError

INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "validation")

SplitName = Literal["train", "validation"]
Dtype = Literal["uint16", "uint32"]
Option = str | int | float | tuple[str, ...]

# No slash, no leading dot: a name from the index can only be a plain file of the folder itself.
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Record):
    """One tar. `blocks` holds (byte offset of the raw tokens in the tar, number of tokens), in file order."""

    name: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    blocks: tuple[tuple[int, int], ...]


class Split(_Record):
    """The shards of one split, in stream order, and their totals.

    `text_bytes` counts the UTF-8 bytes of the texts. `gzip9_bytes` is the size of the concatenated
    texts as one gzip file at zlib's level 9 (validation only): the yardstick a model's bits per byte are held
    against. The gzip program itself comes out some 0.2 % smaller.
    """

    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    text_bytes: int
    gzip9_bytes: int | None = None


class TokenizerInfo(_Record):
    """Which tokenizer made the tokens; `sha256` is that of `tokenizer.json` beside the index."""

    kind: Literal["bytes", "bpe"]
    sha256: str


class Source(_Record):
    """Where the texts came from."""

    name: str
    options: dict[str, Option]


class Index(_Record):
    """The whole of `index.json`. `fingerprint` is empty until `write_index` fills it in."""

    format: Literal[1] = 1
    dtype: Dtype
    vocabulary: int
    document_token: int
    tokenizer: TokenizerInfo
    source: Source
    train: Split
    validation: Split
    fingerprint: str = ""

    def split(self, name: SplitName) -> Split:
        """Return one split. Raises UserError when `name` is neither "train" nor "validation"."""
        if name not in SPLITS:
            raise UserError(f"split: there is no {name!r}; use one of {', '.join(SPLITS)}.")
        return self.train if name == "train" else self.validation

    @property
    def item_bytes(self) -> int:
        """Bytes a token takes on disk."""
        return 2 if self.dtype == "uint16" else 4


def dtype_for(vocabulary: int) -> Dtype:
    """Return the narrowest type on disk that holds every id below `vocabulary`."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def fingerprint(index: Index) -> str:
    """Return the sha256 of the index as canonical JSON, without its own fingerprint."""
    fields = index.model_dump(mode="json", exclude={"fingerprint"})
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_index(folder: Path, index: Index) -> Index:
    """Seal `index` with its fingerprint, write it in one step, and return the sealed one.

    Raises UserError when the index contradicts itself or the disk refuses.
    """
    sealed = index.model_copy(update={"fingerprint": fingerprint(index)})
    _check_contents(folder / INDEX_NAME, sealed)
    write_whole(folder / INDEX_NAME, (sealed.model_dump_json() + "\n").encode())
    return sealed


def read_index(folder: Path) -> Index:
    """Read and check `folder/index.json`; the shards themselves are not touched.

    Raises UserError when it is missing, is not JSON, has wrong fields, contradicts itself, names files
    outside the folder, points beyond a shard's end, or was changed after it was written.
    """
    path = folder / INDEX_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}. Give a folder that `python -m data_prep` finished: it writes the index last."
        ) from error
    try:
        index = Index.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}. Prepare the data again with this version.") from error
    _check_contents(path, index)
    if index.fingerprint != fingerprint(index):
        raise UserError(
            f"{path}: fingerprint is {index.fingerprint[:12]!r}, its contents give "
            f"{fingerprint(index)[:12]!r}: the file was changed. Copy it again, or prepare the data again."
        )
    return index


def check_shards(folder: Path, index: Index) -> None:
    """Check that every shard is present and has the right size (one `stat` each).

    Raises UserError that names the first shard that is not so.
    """
    for shard in _shards(index):
        path = folder / shard.name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}. Copy this shard again, or prepare the data again.") from error
        if found != shard.bytes:
            raise UserError(
                f"{path}: {found} bytes, the index says {shard.bytes}. Copy this shard again, or prepare "
                "the data again."
            )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    if problem["type"] == "json_invalid":
        return f"not JSON ({problem['ctx']['error']})"
    key = ".".join(str(part) for part in problem["loc"])
    found = "" if problem["type"] == "missing" else f", found {str(problem['input'])[:60]!r}"
    return f"{key}: {problem['msg']}{found}"


def _shards(index: Index) -> Iterator[Shard]:
    yield from index.train.shards
    yield from index.validation.shards


def _check_contents(path: Path, index: Index) -> None:
    def refuse(problem: str) -> None:
        raise UserError(f"{path}: {problem}. The index is damaged: copy it again, or prepare the data again.")

    if index.dtype != dtype_for(index.vocabulary):
        refuse(f"dtype is {index.dtype!r}, a vocabulary of {index.vocabulary} needs {dtype_for(index.vocabulary)!r}")
    if not 0 <= index.document_token < index.vocabulary:
        refuse(f"document_token is {index.document_token}, outside the vocabulary of {index.vocabulary}")
    names = [shard.name for shard in _shards(index)]
    if len(set(names)) != len(names):
        refuse("two shards have the same name")
    for shard in _shards(index):
        if not _SHARD_NAME.fullmatch(shard.name):
            refuse(f"shard name {shard.name!r} is not a plain file name that ends in .tar")
        end = 0
        for number, (offset, tokens) in enumerate(shard.blocks):
            start, end = end, offset + tokens * index.item_bytes
            if offset < start or tokens <= 0 or end > shard.bytes:
                refuse(
                    f"{shard.name} block {number} lies at bytes {offset} to {end}, which cannot be: the "
                    f"block before ends at {start} and the shard has {shard.bytes}"
                )
        if sum(tokens for _, tokens in shard.blocks) != shard.tokens:
            refuse(f"{shard.name}: its blocks do not add up to its {shard.tokens} tokens")
    for name in SPLITS:
        split = index.train if name == "train" else index.validation
        if split.tokens != sum(shard.tokens for shard in split.shards):
            refuse(f"{name}.tokens is {split.tokens}, its shards do not add up to that")
        if split.documents != sum(shard.documents for shard in split.shards):
            refuse(f"{name}.documents is {split.documents}, its shards do not add up to that")
