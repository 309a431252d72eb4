"""Real servers of small models in tests: one process each, on a port of their own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.runtime.model_file import write_model_file
from tests.support.models import make_model, make_model_config
from tests.support.runs import ROOT


def pack_small_model(path: Path, *overrides: str, template: str = "") -> Path:
    """Write a file of a model with random weights, whose tokens are bytes, and which never ends a document."""
    config, tokenizer = make_model_config(*overrides), Tokenizer.of_bytes()
    model = make_model(config)
    # Half of the other logits are larger.
    model.head.weight.data[tokenizer.document_token] = 0
    write_model_file(model, config, tokenizer, 3, path, template=template)
    return path


@dataclass
class ServerProcess:
    """A running server.

    Attributes:
        process: its process.
        port: where it listens.
        shown: what it printed when it started.
    """

    process: subprocess.Popen[str]
    port: int
    shown: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and content; a body that is no bytes is sent as JSON, JSON is decoded."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, content, headers or {})
            answer = connection.getresponse()
            data = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return answer.status, found, json.loads(data) if is_json else data

    def chat(self, *texts: str, **fields: Any) -> dict[str, Any]:
        """The object that answers a conversation whose texts alternate, greedily unless `fields` say else."""
        messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
        body = {"messages": messages, "temperature": 0, "max_tokens": 24, **fields}
        status, _, content = self.request("POST", "/v1/chat/completions", body)
        assert status == 200, content
        return content

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Send a signal, and return the exit code and what was printed since the start."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=20)
        return self.process.returncode, rest


@contextlib.contextmanager
def start_server(model: Path, *options: str) -> Iterator[ServerProcess]:
    """Start `mixkabrn serve` and wait until it listens; it is ended at last."""
    command = [sys.executable, "-m", "kabrn_dist", "serve", str(model), "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        shown = ""
        while not (found := re.search(r"API: +http://[^/]*:(\d+)/v1", shown)):
            line = process.stdout.readline()
            assert line, shown
            shown += line
        yield ServerProcess(process, int(found[1]), shown)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
