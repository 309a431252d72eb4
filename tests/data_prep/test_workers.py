"""Processes that share a preparation: one that is left alone ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_prep import workers
from data_prep.__main__ import main
from kabrn_dist.utils.errors import UserError
from tests.support import corpora as data

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


@pytest.mark.parametrize("unread", [b"", b"a job that the worker has not read\n"])
def test_rank_0_says_that_a_worker_has_died(unread: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> tuple[subprocess.Popen[bytes], object]:
        own, worker = socket.socketpair()
        own.sendall(unread)
        worker.close()
        return subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]), own.makefile("rwb")

    monkeypatch.setattr(workers, "_start_worker", start)
    expected = "^worker 1 ended with signal 15; run the same command again to continue$"
    with pytest.raises(UserError, match=expected), workers.start_workers(2, {}) as group:
        group.barrier()


def test_an_interrupt_does_not_end_a_worker_that_starts() -> None:
    process, stream = workers._start_worker(1, 2, {}, [])
    process.send_signal(signal.SIGINT)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    stream.close()


@pytest.mark.slow
def test_a_worker_starts_without_torch() -> None:
    code = "import data_prep.worker, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # Its import takes longer than all others together, in every worker.
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_workers_see_the_recipe_of_the_command_line_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without any option: defaults must not change their types on the way."""
    data.write_folder(tmp_path / "in", {f"{number}.txt": f"a text of the number {number}" for number in range(30)})
    command = ["--source", "text", "--input", str(tmp_path / "in"), "--tokenizer", "bytes"]
    for folder, count in (("one", 1), ("two", 2)):
        assert main([*command, "--workers", str(count), "--out", str(tmp_path / folder)]) == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in ("one", "two"))
    assert one == two and one
    # What another number of workers has finished is finished.
    assert main([*command, "--workers", "1", "--out", str(tmp_path / "two")]) == 0
    assert "nothing to do" in capsys.readouterr().out
