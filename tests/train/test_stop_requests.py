"""Ways to end a run: whoever is asked, all ranks save and go; one that hangs or fails takes the others with it."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from kabrn_dist.checkpoint.store import read_manifest
from kabrn_dist.config.run import RunConfig
from kabrn_dist.train.stop_requests import ECHO_SECONDS, StopRequests
from kabrn_dist.utils.launch_time import launch_time
from tests.support import fork_server
from tests.support.runs import (
    ROOT,
    deepspeed_command,
    start_command,
    torchrun_command,
    wait_for_exit,
    wait_for_steps,
    write_small_config,
)

TRAIN = "launch/train.py"
LONG = {"training__steps": 5000, "parallel__expert_parallel": 2}


def train(config: Path, world: int, *options: str, **variables: str) -> fork_server.RankGroup:
    """launch/train.py in `world` processes."""
    return fork_server.start_ranks("launch.train:main", [["--config", str(config), *options]], world, **variables)


def until(happened: Callable[[], bool], group: fork_server.RankGroup) -> None:
    """Wait for what a running group does."""
    deadline = time.monotonic() + 60
    while not happened():
        assert None in group.exit_codes() and time.monotonic() < deadline, group.output()
        time.sleep(0.01)


def entries(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log."""
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def check_saved(folder: Path) -> int:
    """The last step that was taken is the one that was saved; returns it."""
    last = int(entries(folder)[-1]["step"])
    assert read_manifest(folder / "checkpoints" / f"step-{last:08d}").state["step"] == last
    return last


@pytest.mark.parametrize(
    ("rank", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGUSR1), (0, signal.SIGHUP), (0, signal.SIGINT)],
    ids=lambda v: str(int(v)),
)
def test_a_signal_to_one_rank_stops_and_saves_all(
    rank: int, number: signal.Signals, shards: Path, tmp_path: Path
) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", guard__stop_exit_code=75, **LONG)
    with train(config, 2) as group:
        until(lambda: len(entries(tmp_path / "run")) >= 2, group)
        group.kill(rank, number)
        ended = group.wait(60, grace=None)
    assert ended.exit_codes == (75, 75), ended.output
    last = check_saved(tmp_path / "run")
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    cause = name if rank == 0 else "a signal to another process"
    assert f"stopped at step {last} by {cause}\n" in ended.output, ended.output
    assert "error" not in ended.output and "Traceback" not in ended.output
    with train(config, 2, "--resume", "must", "--set", f"training.steps={last + 1}") as group:
        ended = group.wait(60)
    assert ended.exit_codes == (0, 0) and f"at step {last}\n" in ended.output, ended.output


def test_a_stop_file_is_seen_while_validating(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    every = {"validation__eval_interval": 2, "validation__eval_sequences": 4096}
    config = write_small_config(tmp_path / "c.yaml", shards, folder, **LONG, **every)
    with train(config, 2) as group:
        until(lambda: bool(entries(folder)) and entries(folder)[-1]["step"] == 2, group)
        (folder / "STOP").touch()
        ended = group.wait(60, grace=None)
    assert ended.exit_codes == (0, 0), ended.output
    assert check_saved(folder) == 2 and f"stopped at step 2 by the file {folder}/STOP\n" in ended.output
    assert "validation" not in ended.output and not any("validation/loss" in entry for entry in entries(folder))


def test_a_run_ends_when_its_time_is_up(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", run__max_minutes=0.03, **LONG)
    with train(config, 2) as group:
        ended = group.wait(60, grace=None)
    assert ended.exit_codes == (0, 0) and "by run.max_minutes 0.03\n" in ended.output, ended.output
    check_saved(tmp_path / "run")


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time; from pathlib import Path; from kabrn_dist.train import stop_requests\n"
        "stop_requests.ECHO_SECONDS = 0.3\n"
        "w = stop_requests.StopRequests(Path(sys.argv[1]), True, None, 0.0)\n"
        "with w.listening():\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(w.requested(), flush=True)\n"
        "    time.sleep(0.4); os.kill(os.getpid(), signal.SIGINT); time.sleep(1); print('still here')\n"
    )
    ended = wait_for_exit(start_command([sys.executable, "-c", code, str(tmp_path)]), 60)
    assert (ended.exit_code, ended.output) == (-signal.SIGINT, "True\n")


def test_time_and_file_are_stop_requests(tmp_path: Path) -> None:
    assert ECHO_SECONDS < 10 and RunConfig(folder=tmp_path).max_minutes is None
    (tmp_path / "STOP").touch()
    requests = StopRequests(tmp_path, True, None, launch_time())
    assert requests.requested() and not StopRequests(tmp_path, False, None, launch_time()).requested()
    with requests.listening():
        assert requests.requested(), "a file that came while the processes started is an order"
    with StopRequests(tmp_path, True, None, time.time() + 5).listening():
        assert not requests.requested(), "a leftover file is removed"
    assert StopRequests(tmp_path, True, 0.0, launch_time()).cause() == "run.max_minutes 0"
    assert not StopRequests(tmp_path, False, 0.0, launch_time()).requested(), "one rank looks at the clock"


def test_an_order_that_comes_while_starting_is_obeyed(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", training__steps=5000)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    os.utime(tmp_path / "run" / "STOP", (1, 1))
    with train(config, 1, "--stop-after", "2") as group:
        assert "stopped at step 2 by --stop-after\n" in group.wait(60).output, "a leftover is no order"
    with train(config, 1) as group:
        (tmp_path / "run" / "STOP").touch()
        ended = group.wait(60)
    assert ended.exit_codes == (0,) and "stopped at step 3" in ended.output, ended.output


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        requests = StopRequests(tmp_path, True, None, launch_time())
        with requests.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requests.requested() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with requests.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_ends_in_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", guard__stop_exit_code=75)
    command = [sys.executable, "-m", "kabrn_dist", "train", str(config), "--set", "training.steps=5000"]
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    shown = b""
    try:
        while b"step      2" not in shown:
            shown += os.read(terminal, 4096)
    finally:
        # The kernel hangs up, and what is printed from now on is an error.
        os.close(terminal)
        _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 75, shown.decode(errors="replace")
    check_saved(tmp_path / "run")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_end_of_the_launcher_ends_in_a_checkpoint(launcher: str, shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", **LONG)
    command = {"torchrun": torchrun_command, "deepspeed": deepspeed_command}[launcher](
        2, TRAIN, "--config", str(config)
    )
    process = start_command(command)
    wait_for_steps(process, tmp_path / "run", 2)
    parent = psutil.Process(process.pid)
    if launcher == "deepspeed":
        # `deepspeed` starts the process that starts and ends the ranks; schedulers signal all of them.
        parent = next(child for child in parent.children() if "deepspeed.launcher.launch" in child.cmdline())
    parent.terminate()
    ended = wait_for_exit(process, timeout=60)
    assert "stopped at step" in ended.output, ended.output
    check_saved(tmp_path / "run")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_error_of_one_rank_comes_first_and_ends_all(launcher: str, shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", **LONG)
    command = {"torchrun": torchrun_command, "deepspeed": deepspeed_command}[launcher](
        2, TRAIN, "--config", str(config)
    )
    ended = wait_for_exit(start_command(command, KABRN_FAULT="step.begin@1#3:raise"), timeout=60)
    assert ended.exit_code != 0
    _check_cause(ended.output)


def test_the_others_say_one_line_of_a_rank_that_has_gone(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", **LONG)
    with train(config, 2, KABRN_FAULT="step.begin@1#3:raise") as group:
        ended = group.wait(60, grace=None)
    assert ended.exit_codes == (1, 1), ended.output
    _check_cause(ended.output)
    assert "rank 0 exits because another rank failed" in ended.output


def _check_cause(out: str) -> None:
    assert "error on rank 1" in out and "RuntimeError: injected fault at step.begin" in out, out
    traces = out.split("Traceback (most recent call last):")[1:]
    # torchrun, started as a module, has a traceback of its own after all of ours.
    assert len([trace for trace in traces if "<frozen runpy>" not in trace]) == 1, out


def test_a_rank_that_hangs_shows_its_stacks_and_ends(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", guard__hang_timeout_s=3, **LONG)
    with train(config, 2, KABRN_FAULT="step.begin@1#3:sleep") as group:
        ended = group.wait(60, grace=None)
    assert ended.exit_codes == (70, 70), ended.output
    for rank in (0, 1):
        assert f"error: rank {rank} made no progress for" in ended.output
    assert (
        "while in step 3" in ended.output and "in _trigger" in ended.output and "in next_step_batches" in ended.output
    )


def test_a_second_run_on_one_folder_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = write_small_config(tmp_path / "c.yaml", shards, folder, **LONG)
    with train(config, 2) as first:
        until(lambda: len(entries(folder)) >= 2, first)
        before = (folder / "config.yaml").stat().st_mtime_ns
        with train(config, 2) as second:
            refused = second.wait(60, grace=None)
        assert refused.exit_codes == (2, 2) and f"{folder}: a run is active in this folder" in refused.output, (
            refused.output
        )
        assert (folder / "config.yaml").stat().st_mtime_ns == before
        first.kill(1, signal.SIGTERM)
        ended = first.wait(60, grace=None)
    assert ended.exit_codes == (0, 0), ended.output
    assert [entry["step"] for entry in entries(folder)] == list(range(1, check_saved(folder) + 1))
