"""Log files on a disk that refuses writes."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from tensorboard.compat.tensorflow_stub.io import gfile

from kabrn_dist.metrics.writer import LogWriter


def test_a_full_disk_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def report(failure: threading.ExceptHookArgs) -> None:
        print(failure.exc_value)

    monkeypatch.setattr(threading, "excepthook", report)
    writer = LogWriter(tmp_path, 0)
    monkeypatch.setattr(gfile.LocalFileSystem, "_write", refuse)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            writer.log_tensorboard(step, lambda board: board.add_scalar("loss", 1.0))
            writer.log_tensorboard(step, lambda board: board.flush())
        # Another thread's failure is not hidden.
        thread = threading.Thread(target=refuse, args=("another",))
        thread.start()
        thread.join()
        writer.close()
    problem = "[Errno 28] No space left on device"
    assert caplog.messages == [f"{tmp_path}/tensorboard: cannot be written ({problem}); the run goes on without"]
    assert capsys.readouterr().out == f"{problem}\n"
    assert threading.excepthook is report
