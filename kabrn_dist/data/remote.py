"""Shard sets behind a URL: downloaded through fsspec to a cache on this machine, chunk by chunk, and verified."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kabrn_dist.data.cache import FileCache
from kabrn_dist.data.index import CHAT_TEMPLATE_NAME, INDEX_NAME, TOKENIZER_NAME, Shard
from kabrn_dist.data.index_io import parse_index
from kabrn_dist.data.shard_set import MAX_OPEN_FILES, ShardSet, open_shard_folder
from kabrn_dist.data.tokenizer import Tokenizer, check_tokenizer
from kabrn_dist.utils.atomic_io import sha256_of
from kabrn_dist.utils.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Seconds to wait after each failed try.
_RETRY_AFTER_SECONDS = (0.3, 1.0, 4.0, 15.0)
# Bytes of a request; what has arrived by then survives a failure or a kill.
_CHUNK_BYTES = 8 << 20


def is_url(path: str) -> bool:
    """Return whether a path is a URL, `protocol://…`."""
    return "://" in path


def open_shard_set(path: str, cache_dir: Path, cache_size_gb: float) -> ShardSet:
    """Open a folder or a URL of shards.

    Args:
        path: Folder or URL.
        cache_dir: Folder of the cache for URLs.
        cache_size_gb: Limit on the cache in GB.

    Raises:
        UserError: if the index cannot be read or is wrong.
    """
    return RemoteSet(path, cache_dir, int(cache_size_gb * 1e9)) if is_url(path) else open_shard_folder(Path(path))


class RemoteFiles:
    """Files under a URL.

    Args:
        url: URL of the folder.

    Attributes:
        url: URL without a slash at the end.

    Raises:
        UserError: for a protocol that this machine cannot read.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.split("://", 1)[0]
        # aiohttp reads the proxy from the environment only on request.
        options = {"client_kwargs": {"trust_env": True}} if protocol in ("http", "https") else {}
        try:
            # An extra of the package: most shard sets are folders.
            import fsspec

            self._files: Any = fsspec.filesystem(protocol, **options)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"data.path {url}: {protocol}:// cannot be read here ({error}); pip install fsspec with aiohttp for "
                "http and https, s3fs for s3, gcsfs for gs, huggingface_hub for hf"
            ) from error

    def read(self, name: str) -> bytes:
        """Return the content of a small file.

        Raises:
            UserError: if it cannot be read, after retries.
        """
        return self._with_retries(name, lambda path: bytes(self._files.cat_file(path)))

    def download(self, shard: Shard, part: Path) -> None:
        """Complete a partial file to the whole shard and verify its sha256.

        A file that turns out wrong is downloaded once more from its beginning.

        Args:
            shard: Shard to download.
            part: Its first bytes, possibly none.

        Raises:
            UserError: if the second download is wrong, too, or the shard cannot be read.
        """
        for attempt in (1, 2):
            while (size := part.stat().st_size) < shard.bytes:
                self._append(shard, part, size)
            digest = sha256_of(part)
            if digest == shard.sha256:
                return
            part.write_bytes(b"")
            if attempt == 2:
                raise UserError(
                    f"{self.url}/{shard.name}: came twice with sha256 {digest[:12]}…, the index says "
                    f"{shard.sha256[:12]}…; upload this shard again, or prepare the data again"
                )

    def _append(self, shard: Shard, part: Path, start: int) -> None:
        count = min(_CHUNK_BYTES, shard.bytes - start)

        def request(path: str) -> bytes:
            content = bytes(self._files.cat_file(path, start=start, end=start + count))
            # A server without ranges sends the whole file.
            content = content[start:] if len(content) == shard.bytes > count else content
            if not content:
                raise OSError(f"{start} bytes, the index says {shard.bytes}")
            return content

        content = self._with_retries(shard.name, request)
        with part.open("ab") as file:
            file.write(content)

    def _with_retries(self, name: str, request: Callable[[str], Result]) -> Result:
        url = f"{self.url}/{name}"
        path = self._files._strip_protocol(url)
        problem: Exception | None = None
        for pause in (*_RETRY_AFTER_SECONDS, None):
            try:
                return request(path)
            # Every file system raises its own exceptions, most of them transient.
            except Exception as error:
                problem = error
                if _is_final(error):
                    raise UserError(f"{url}: {_reason(error)}; check the URL and who may read it") from error
            if pause is not None:
                time.sleep(pause)
        assert problem is not None
        raise UserError(
            f"{url}: {_reason(problem)}, in {len(_RETRY_AFTER_SECONDS) + 1} tries; check the network, then start "
            "again: what has been downloaded is kept"
        ) from problem


class RemoteSet:
    """A shard set under a URL, whose shards are downloaded to a cache as they are needed.

    Args:
        url: URL of the folder.
        cache: Folder of the cache.
        limit: Most bytes to keep in the cache.

    Attributes:
        index: Contents of the set.
        location: The URL, for messages.
        max_open_files: Number of shards that a reader may keep open.
        is_remote: True.

    Raises:
        UserError: if the index cannot be read or is wrong, or one shard is larger than the cache.
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
                f"{largest / 1e9:.2g} GB; set data.cache_size_gb to the size of the whole set, "
                f"{total / 1e9:.3g}, if the disk has room"
            )
        if total > limit:
            # The order draws from all over the set.
            logger.warning(
                "data.cache_size_gb %g: %s has %.3g GB, so shards will be downloaded again and again; "
                "set data.cache_size_gb so that the cache holds the whole set",
                limit / 1e9,
                self.location,
                total / 1e9,
            )
        # An open file keeps its disk space even when the cache has evicted it.
        self.max_open_files = max(1, min(MAX_OPEN_FILES, limit // (4 * largest)))
        self._cache = FileCache(cache, limit)

    def locate(self, shard: Shard) -> Path:
        """Return the shard's file in the cache, downloading it if needed.

        Raises:
            UserError: if it cannot be downloaded.
        """
        return self._cache.get(shard.sha256, shard.bytes, lambda part: self._files.download(shard, part))

    def prefetch(self, shard: Shard) -> None:
        """Download the shard to the cache, unless another process is doing so.

        Raises:
            UserError: if it cannot be downloaded.
        """
        self._cache.prefetch(shard.sha256, shard.bytes, lambda part: self._files.download(shard, part))

    def tokenizer(self) -> Tokenizer:
        """Return the set's tokenizer.

        Raises:
            UserError: if it cannot be read or is not the one that made the shards.
        """
        origin = f"{self.location}/{TOKENIZER_NAME}"
        template = b""
        if self.index.tokenizer.chat_template_sha256 is not None:
            template = self._files.read(CHAT_TEMPLATE_NAME)
        tokenizer = Tokenizer(self._files.read(TOKENIZER_NAME), origin, template.decode("utf-8", "replace"))
        return check_tokenizer(tokenizer, self.index, origin)


def _is_final(error: Exception) -> bool:
    status = int(getattr(error, "status", 0) or 0)
    is_rate_limited = status in (408, 429)
    return isinstance(error, FileNotFoundError | PermissionError) or (400 <= status < 500 and not is_rate_limited)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    # The messages of the file systems fill several lines.
    return " ".join(str(error).split())[:200] or type(error).__name__
