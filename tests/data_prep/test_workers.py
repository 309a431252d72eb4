"""Processes that share a preparation: one that is left alone ends."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_prep import workers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("unread", [b"", b"a text that rank 0 has not read\n"])
def test_a_worker_ends_with_rank_0(unread: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(workers.os, "_exit", lambda code: ended.set())
    own, rank_0 = socket.socketpair()
    own.sendall(unread)
    worker = workers.Worker(1, 2, own)
    # With something unread in it, closing resets the connection, as the end of a process does.
    rank_0.close()
    assert ended.wait(10) and worker.rank == 1


@pytest.mark.slow
def test_a_worker_starts_without_torch() -> None:
    code = "import data_prep.worker, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # Its import takes longer than all others together, in every worker.
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_workers_share_a_preparation_with_default_settings(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"the text of {name} " * 50)
    flags = ["--source", "text", "--input", str(tmp_path / "one.txt"), str(tmp_path / "two.txt"), "--vocabulary", "300"]
    made = []
    for count in ("1", "2"):
        out = tmp_path / f"by-{count}"
        command = [sys.executable, "-m", "data_prep", *flags, "--workers", count, "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "training a tokenizer of 300 ids on 0.0 MB" in done.stdout, done.stderr
        made.append({path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith("report.")})
    assert made[0] == made[1]
