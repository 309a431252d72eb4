"""A web server of a folder for tests: it supports ranges, records its responses, and can misbehave."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Web(ThreadingHTTPServer):
    """Serves `folder`.

    Attributes:
        responses: (name, first byte, bytes sent) of every response.
        ranges: Support ranges; otherwise every response is the whole file.
        spoil: How many more times the last byte of a file comes flipped, by name.
        fail: How many more times a file is answered with an error 503, by name.
        pause: Seconds before each 64 KiB.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.pause = folder, True, 0.0
        self.responses: list[tuple[str, int, int]] = []
        self.spoil: dict[str, int] = {}
        self.fail: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sent(self, suffix: str = ".tar") -> int:
        """Bytes of files so named that have been sent."""
        return sum(size for name, _, size in self.responses if name.endswith(suffix))

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed in the middle are what tests are about."""


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """A server for the length of a test."""
    web = Web(folder)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.shutdown()
        web.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        web, name = self.server, self.path.lstrip("/")
        path = web.folder / name
        if web.fail.get(name, 0) or not path.is_file():
            code = 503 if path.is_file() else 404
            web.fail[name] = web.fail.get(name, 0) - (code == 503)
            self.send_error(code)
            return
        content, first, last = path.read_bytes(), 0, path.stat().st_size - 1
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if web.spoil.get(name, 0) and (not requested or int(requested[2] or last) >= last):
            web.spoil[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        if requested and web.ranges:
            first, last = int(requested[1]), min(int(requested[2] or last), last)
        self.send_response(206 if requested and web.ranges else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        if requested and web.ranges:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        web.responses.append((name, first, last + 1 - first))
        for at in range(first, last + 1, 1 << 16):
            time.sleep(web.pause)
            self.wfile.write(content[at : min(at + (1 << 16), last + 1)])

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
