"""A server on this machine that speaks as much of the Hugging Face hub's protocol as an upload needs.

Large files travel by Git LFS: a batch request names them, their bytes follow one by one, each is verified, and a commit
(newline-delimited JSON) joins them with the small ones. Bytes are kept, so that tests can compare them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class HubServer(ThreadingHTTPServer):
    """A hub.

    Attributes:
        token: The only token that it takes.
        owners: Those that the token may write to.
        repositories: Name → whether it is private.
        branches: Of all repositories, by "OWNER/NAME@BRANCH" → name of file → bytes.
        objects: Bytes of large files by their sha256.
        requests: Method and path of each request.
        spoil: Whether large files arrive with a flipped bit.
    """

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.owners = token, {"ada"}
        self.repositories: dict[str, bool] = {}
        self.branches: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.spoil = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve_hub(token: str) -> Iterator[HubServer]:
    """A hub for the length of a test."""
    hub = HubServer(token)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_PUT(self) -> None:
        self.server.requests.append(f"PUT {self.path}")
        content = self._body()
        if self.server.spoil:
            content = bytes([content[0] ^ 1]) + content[1:]
        self.server.objects[self.path.rpartition("/")[2]] = content
        self._answer(200, {})

    def do_GET(self) -> None:
        self.server.requests.append(f"GET {self.path}")
        self._answer(404, {"error": "Repository not found"})

    def do_POST(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(f"POST {path}")
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path == "/verify":
            self._verify(json.loads(body)["oid"])
        else:
            self._change_repository(path, body)

    def _change_repository(self, path: str, body: bytes) -> None:
        hub = self.server
        owner, name, verb, branch = path.removeprefix("/api/models/").split("/", 3)
        repository, branch = f"{owner}/{name}", unquote(branch)
        if verb == "branch" and repository in hub.repositories:
            hub.branches.setdefault(f"{repository}@{branch}", {})
            self._answer(200, {})
        elif f"{repository}@{branch}" not in hub.branches:
            self._answer(404, {"error": "Repository or revision not found"})
        elif verb == "preupload":
            self._answer(200, {"files": [_how_to_send(file) for file in json.loads(body)["files"]]})
        else:
            self._commit(repository, branch, [json.loads(line) for line in body.splitlines()])

    def _verify(self, oid: str) -> None:
        right = hashlib.sha256(self.server.objects.get(oid, b"")).hexdigest() == oid
        self._answer(200 if right else 422, {} if right else {"error": "the content has another sha256"})

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization")
        if owner not in self.server.owners:
            self._answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
            return
        repository = f"{owner}/{asked['name']}"
        status = 409 if repository in self.server.repositories else 200
        is_private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories.setdefault(repository, bool(is_private))
        self.server.branches.setdefault(f"{repository}@main", {})
        self._answer(status, {"url": f"{self.server.url}/{repository}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for wanted in asked["objects"]:
            upload = {"href": f"{self.server.url}/objects/{wanted['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.server.url}/verify"}}
            is_there = wanted["oid"] in self.server.objects
            objects.append(wanted if is_there else {**wanted, "actions": actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.branches[f"{repository}@{branch}"]
        for line in lines[1:]:
            value = line["value"]
            is_small = line["key"] == "file"
            files[value["path"]] = base64.b64decode(value["content"]) if is_small else self.server.objects[value["oid"]]
        url = f"{self.server.url}/{repository}/commit/{'0' * 40}"
        self._answer(200, {"commitUrl": url, "commitOid": "0" * 40})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _how_to_send(file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith(".safetensors")
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}
