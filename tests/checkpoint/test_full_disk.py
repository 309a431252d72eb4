"""K3: a disk that is really full under a run: one save is lost and no more; one that stays full ends it cleanly."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kabrn_dist.checkpoint.layout import list_checkpoints
from kabrn_dist.checkpoint.store import CheckpointStore
from tests.checkpoint.test_kill import TINY
from tests.support import fork_server
from tests.support.runs import write_small_config
from tests.train.test_stop_requests import entries, train, until

EVERY, STEPS = 20, 120
BALLAST = "ballast"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    """To the last byte."""
    with open(disk / BALLAST, "ab", buffering=0) as ballast:
        for size in (65536, 1):
            try:
                while ballast.write(b"x" * size):
                    pass
            except OSError:
                continue


def limit(group: fork_server.RankGroup, size: float) -> None:
    """From now on rank 1 writes no file beyond so many bytes."""
    psutil.Process(group.pids[1]).rlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))


@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_a_full_disk_costs_one_checkpoint_and_ends_a_run_only_if_it_stays_full(
    kind: str, shards: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    disk: Path = request.getfixturevalue("small_disk") if kind == "disk" else tmp_path
    folder = disk / "run"
    changes = TINY | {"training__steps": STEPS, "checkpoint__save_interval": EVERY}
    config = write_small_config(tmp_path / "c.yaml", shards, folder, **changes)

    def set_full(full: bool) -> None:
        if kind == "limit":
            limit(group, 100 if full else resource.RLIM_INFINITY)
        elif full:
            fill(disk)
        else:
            (disk / BALLAST).unlink()

    def safe(step: int) -> Callable[[], bool]:
        return (folder / "checkpoints" / f"step-{step:08d}").exists

    with train(config, 2) as group:
        until(safe(EVERY), group)
        set_full(True)
        until(lambda: f"checkpoint of step {2 * EVERY} was not saved" in group.output(), group)
        set_full(False)
        until(safe(3 * EVERY), group)
        set_full(True)
        ended = group.wait(120, grace=None)
    assert ended.exit_codes == (2, 2), ended.output
    if kind == "disk":
        fill(disk)
        with train(config, 2) as group:
            again = group.wait(120, grace=None)
        assert again.exit_codes == (2, 2) and "No space left" in again.output and "Traceback" not in again.output, (
            again.output
        )
        set_full(False)
    assert "2 checkpoints in a row could not be saved" in ended.output and "ends the run" not in ended.output, (
        ended.output
    )
    if kind == "disk":
        # Rank 0 writes there too.
        assert f"{folder / 'log.jsonl'}: cannot be written" in " ".join(ended.output.split()), ended.output
    store = CheckpointStore(folder / "checkpoints")
    assert [path.name for path in list_checkpoints(store.folder)] == [f"step-{step:08d}" for step in (3 * EVERY, EVERY)]
    assert all(store.check(path) for path in list_checkpoints(store.folder))
    steps = [entry["step"] for entry in entries(folder)]
    assert steps == sorted(set(steps)) and 3 * EVERY - 1 in steps and (2 * EVERY in steps) == (kind == "limit")
    with train(config, 2, "--resume", "must") as group:
        ended = group.wait(120, grace=None)
    assert ended.exit_codes == (0, 0) and f"at step {3 * EVERY}\n" in ended.output, ended.output
    assert [entry["step"] for entry in entries(folder) if "loss/total" in entry][-EVERY:] == [
        *range(STEPS - EVERY + 1, STEPS + 1)
    ]
