"""Ranks whose launcher is killed save and end, instead of training on where nobody stops them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from kabrn_dist.checkpoint.layout import list_checkpoints
from kabrn_dist.train.launcher_watch import LauncherWatch
from tests.support.runs import deepspeed_command, start_command, torchrun_command, wait_for_steps, write_small_config


def test_a_process_that_a_shell_started_watches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ranks that are started by hand, as with nohup, go on when their shell ends.
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert LauncherWatch()._parents == {} and not LauncherWatch().is_gone()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["deepspeed", "deepspeed.launcher.launch", "torchrun"])
def test_a_killed_launcher_stops_its_ranks(who: str, shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", training__steps=5000)
    launcher = torchrun_command if who == "torchrun" else deepspeed_command
    process = start_command(launcher(2, "launch/train.py", "--config", str(config)))
    wait_for_steps(process, tmp_path / "run", 3)
    below = psutil.Process(process.pid).children(recursive=True)
    ranks = [each for each in below if "launch/train.py" in each.cmdline() and "-m" not in each.cmdline()]
    assert len(ranks) == 2
    killed = next((each.pid for each in below if who in each.cmdline()), process.pid)
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in ranks):
        assert time.monotonic() < deadline, "ranks go on"
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
