"""`AdapterHistory`: what was learned is never lost, whatever happens to the disk or to the process."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kabrn_dist.adapters.adapter import Adapter, AdapterInfo, StateFactors
from kabrn_dist.online_learning.history import AdapterHistory
from kabrn_dist.utils.errors import UserError
from tests.support.runs import ROOT

INFO = AdapterInfo("mine", "state", 1, 1.0, (), "a" * 64)


def make_state(value: float, size: int = 4) -> Adapter:
    factors = np.full((1, 1, size), value, np.float32)
    return Adapter(INFO, states={0: StateFactors(factors, factors)})


def read_value(history: AdapterHistory) -> float:
    adapter = history.read()
    assert adapter is not None
    return float(adapter.states[0].key[0, 0, 0])


@contextmanager
def limited_files(limit: int) -> Iterator[None]:
    """Let no file grow above some bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [4, 4000], ids=["the copy fails", "the adapter fails"])
def test_a_full_disk_costs_nothing_that_was_learned(tmp_path: Path, size: int) -> None:
    history = AdapterHistory(tmp_path / "mine")
    history.save(make_state(1, 4000 if size == 4 else 4))
    history.save(make_state(2, 4000 if size == 4 else 4))
    with limited_files(4096), pytest.raises(UserError, match="cannot be written"):
        history.save(make_state(3, size))
    assert read_value(history) == 2
    history.undo()
    assert read_value(history) == 1
    assert history.undo() is None and not (tmp_path / "mine").exists()
    with pytest.raises(UserError, match="nothing was learned"):
        history.undo()


def test_a_version_that_was_not_finished_is_none(tmp_path: Path) -> None:
    history = AdapterHistory(tmp_path / "mine")
    history.save(make_state(1))
    # What a process leaves that is killed while it saves.
    (tmp_path / "mine.history" / "draft").mkdir()
    history.save(make_state(2))
    (tmp_path / "mine.history" / "draft").mkdir()
    history.undo()
    assert read_value(history) == 1


def test_undo_leaves_files_of_others_in_the_folder(tmp_path: Path) -> None:
    history = AdapterHistory(tmp_path / "mine")
    history.save(make_state(1))
    (tmp_path / "mine" / "README.md").write_text("mine")
    assert history.undo() is None
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]


def test_two_chats_do_not_write_over_each_other(tmp_path: Path) -> None:
    first = AdapterHistory(tmp_path / "mine")
    first.save(make_state(1))
    program = (
        "import sys; from pathlib import Path; from kabrn_dist.online_learning.history import AdapterHistory\n"
        "history = AdapterHistory(Path(sys.argv[1]))\n"
        "history.undo()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "mine")]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert "another chat is learning into it" in other.stderr and read_value(first) == 1
    first.close()
    second = AdapterHistory(tmp_path / "mine")
    second.save(make_state(2))
    second.close()
    for change in (first.hold, first.undo, lambda: first.save(make_state(3))):
        with pytest.raises(UserError, match="has changed the adapter meanwhile"):
            change()
    assert read_value(second) == 2


def test_the_folder_may_be_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    history = AdapterHistory(Path())
    history.save(make_state(1))
    assert (tmp_path / "mine.history" / "0001").is_dir() and read_value(history) == 1
    with pytest.raises(UserError, match="holds something else"):
        AdapterHistory(Path("/"))
