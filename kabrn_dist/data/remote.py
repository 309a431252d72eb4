"""Shard sets behind a URL: fetched through fsspec to a cache on this machine, piece by piece, and verified."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from kabrn_dist.data.cache import FileCache
from kabrn_dist.data.index import INDEX_NAME, TOKENIZER_NAME, Shard
from kabrn_dist.data.index_io import parse_index
from kabrn_dist.data.shard_set import ShardSet, open_shard_folder
from kabrn_dist.data.tokenizer import Tokenizer, check_tokenizer
from kabrn_dist.utils.atomic_io import sha256_of
from kabrn_dist.utils.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# This long after a failed try comes the next one.
_RETRY_AFTER_SECONDS = (0.3, 1.0, 4.0, 15.0)
# A request asks for so much; what has come by then survives a failure or a kill.
_CHUNK_BYTES = 8 << 20
_OPEN_FILES = 64


def is_url(path: str) -> bool:
    """True for `protocol://…`."""
    return "://" in path


def open_shard_set(path: str, cache_dir: Path, cache_size_gb: float) -> ShardSet:
    """Open a folder or a URL. Raises UserError when the index cannot be had or is wrong."""
    return RemoteSet(path, cache_dir, int(cache_size_gb * 1e9)) if is_url(path) else open_shard_folder(Path(path))


class RemoteFiles:
    """Files under a URL. Raises UserError for a protocol that this machine cannot speak."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.split("://", 1)[0]
        # Behind a proxy the environment says so, which aiohttp asks for only when told.
        options = {"client_kwargs": {"trust_env": True}} if protocol in ("http", "https") else {}
        try:
            self._files: Any = fsspec.filesystem(protocol, **options)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"data.path {url}: {protocol}:// cannot be read here ({error}). s3://, gs:// and hf:// need "
                "`pip install '.[remote]'`; http:// and https:// need nothing more."
            ) from error

    def read(self, name: str) -> bytes:
        """Return a small file whole. Raises UserError when it cannot be had, after retries."""
        return self._with_retries(name, lambda path: bytes(self._files.cat_file(path)))

    def download(self, shard: Shard, part: Path) -> None:
        """Bring `part` up to the whole shard, from where it stands, and verify its sha256.

        A part that turns out wrong is fetched once more from its beginning. Raises UserError when that is wrong, too,
        or the file cannot be had.
        """
        for again in (True, False):
            while (have := part.stat().st_size) < shard.bytes:
                self._append(shard, part, have)
            found = sha256_of(part)
            if found == shard.sha256:
                return
            part.write_bytes(b"")
            if not again:
                raise UserError(
                    f"{self.url}/{shard.name}: came twice with sha256 {found[:12]}…, the index says "
                    f"{shard.sha256[:12]}…. Upload this shard again, or prepare the data again."
                )

    def _append(self, shard: Shard, part: Path, have: int) -> None:
        wanted = min(_CHUNK_BYTES, shard.bytes - have)

        def ask(path: str) -> bytes:
            content = bytes(self._files.cat_file(path, start=have, end=have + wanted))
            # A server that knows no ranges sends the whole file.
            content = content[have:] if len(content) == shard.bytes > wanted else content
            if not content:
                raise OSError(f"{have} bytes, the index says {shard.bytes}")
            return content

        content = self._with_retries(shard.name, ask)
        with part.open("ab") as file:
            file.write(content)

    def _with_retries(self, name: str, ask: Callable[[str], Result]) -> Result:
        url = f"{self.url}/{name}"
        path = self._files._strip_protocol(url)
        problem: Exception | None = None
        for pause in (*_RETRY_AFTER_SECONDS, None):
            try:
                return ask(path)
            # Every store raises errors of its own kind, and most of them pass.
            except Exception as error:
                problem = error
                if _is_final(error):
                    raise UserError(f"{url}: {_reason(error)}. Check the URL and who may read it.") from error
            if pause is not None:
                time.sleep(pause)
        assert problem is not None
        raise UserError(
            f"{url}: {_reason(problem)}, in {len(_RETRY_AFTER_SECONDS) + 1} tries. Check the network, then start "
            "again: what has been fetched is kept."
        ) from problem


class RemoteSet:
    """A shard set under a URL, whose shards come to `cache` as they are needed; at most `limit` bytes are kept.

    Raises UserError when the index cannot be had or is wrong, or one shard is larger than the cache.
    """

    is_remote = True

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        self._files = RemoteFiles(url)
        self.location = self._files.url
        self.index = parse_index(self._files.read(INDEX_NAME), f"{self.location}/{INDEX_NAME}")
        total = sum(shard.bytes for shard in self.index.shards())
        largest = max((shard.bytes for shard in self.index.shards()), default=1)
        if largest > limit:
            raise UserError(
                f"data.cache_size_gb {limit / 1e9:g}: too small for a single shard of {self.location}, which has "
                f"{largest / 1e9:.2g} GB. Set data.cache_size_gb to the size of the whole set, "
                f"{total / 1e9:.3g}, if the disk has room."
            )
        if total > limit:
            # The order draws from all over the set.
            logger.warning(
                "data.cache_size_gb %g: %s has %.3g GB, so shards will come again and again; the cache should hold it whole",
                limit / 1e9,
                self.location,
                total / 1e9,
            )
        # A file that is open keeps its place on the disk even when the cache has dropped it.
        self.max_open_files = max(1, min(_OPEN_FILES, limit // (4 * largest)))
        self._cache = FileCache(cache, limit)

    def locate(self, shard: Shard) -> Path:
        return self._cache.get(shard.sha256, shard.bytes, lambda part: self._files.download(shard, part))

    def prefetch(self, shard: Shard) -> None:
        self._cache.prefetch(shard.sha256, shard.bytes, lambda part: self._files.download(shard, part))

    def tokenizer(self) -> Tokenizer:
        origin = f"{self.location}/{TOKENIZER_NAME}"
        return check_tokenizer(Tokenizer(self._files.read(TOKENIZER_NAME), origin), self.index, origin)


def _is_final(error: Exception) -> bool:
    status = int(getattr(error, "status", 0) or 0)
    asked_too_often = status in (408, 429)
    return isinstance(error, FileNotFoundError | PermissionError) or (400 <= status < 500 and not asked_too_often)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    # The file systems' messages go on for lines.
    return " ".join(str(error).split())[:200] or type(error).__name__
