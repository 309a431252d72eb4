"""Saves beside the training, the lock on a run's folder, and failures at every named point."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.store import CheckpointStore, load_tensor
from kabrn_dist.checkpoint.writer import CHUNK_BYTES
from kabrn_dist.utils import lock as lock_module
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.lock import acquire_lock
from tests.checkpoint.test_store import constant, enter, run
from tests.support.runs import ROOT

POINTS = ("save.begin", "save.written", "save.manifest", "save.supersede", "save.before_rename", "save.renamed")
PRUNING = ("save.before_prune", "save.prune")
LOADING = ("load.manifest", "load.tensors", "load.done")


def value_of(store: CheckpointStore, count: int = 1000) -> float:
    """The one value of the newest checkpoint's tensor."""
    path, values = store.find_latest(), constant(float("nan"), count)
    assert path is not None
    store.load(path, values)
    found = values[0].values.unique().tolist()
    assert len(found) == 1, found
    return float(found[0])


def half(value: float, rank: int, count: int = 1000) -> list[Fragment]:
    return constant(float(value), count, count // 2 * rank, count // 2 * (rank + 1))


def start_and_go_on(rank: int, folder: Path) -> None:
    store = CheckpointStore(folder, background_group=dist.new_group(backend="gloo"))
    state: dict[str, Any] = {"cursor": {"consumed": rank}}
    buffers: list[int] = []
    for step in (1, 2, 3):
        fragments = [*half(step, rank), Fragment("copy", (4,), 0, torch.ones(4), rank == 0)]
        state["cursor"]["consumed"] = step + 10 * rank
        pending = store.save_async(step, fragments, state)
        # What training does next must not reach the checkpoint, and may use the default group meanwhile.
        fragments[0].values.fill_(torch.nan)
        state["cursor"]["consumed"] = -1
        dist.all_reduce(torch.ones(1000))
        with pytest.raises(ValueError, match="under way"):
            store.save_async(step, fragments, state)
        with pytest.raises(ValueError, match="under way"):
            store.save(step, fragments, state)
        assert pending.result() and pending.done() and pending.result()
        assert value_of(store) == step
        assert store.check(folder / f"step-{step:08d}").state == {"cursor": {"consumed": step}}
        buffers.append(store._buffers._buffers["w", 500 * rank, 500, torch.float32].data_ptr())
    assert len(set(buffers)) == 1, "buffers are reused"
    with pytest.raises(ValueError, match="background_group"):
        CheckpointStore(folder).save_async(4, half(4, rank), {})
    out_of_memory(rank, store)


def out_of_memory(rank: int, store: CheckpointStore) -> None:
    """Rank 1 alone cannot copy: 64 GiB that the live values, a view, do not take."""
    count = 2**34
    values = torch.zeros(1).expand(count) if rank == 1 else torch.zeros(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_AS, (2**35, hard))
    assert store.save_async(4, [Fragment("huge", (count,), 0, values, rank == 1)], {}).result() is False
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert value_of(store) == 3
    assert store.save_async(5, half(5, rank), {}).result() and value_of(store) == 5


def test_a_background_save_keeps_the_values_of_its_start(tmp_path: Path) -> None:
    run(2, start_and_go_on, tmp_path)


def peak_bytes(work: Callable[[], object]) -> int:
    """How far this process's memory grew beyond what it was, at most, while it worked."""

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def stay_small(rank: int, folder: Path) -> None:
    """A state of 256 MB: what each way of saving and loading takes beside it."""
    count = 2**26
    store, values = CheckpointStore(folder), constant(1.0, count)
    half_values = [Fragment("w", (count,), 0, torch.zeros(count // 2, dtype=torch.bfloat16), False)]
    assert store.save(1, constant(1.0), {})
    room = CHUNK_BYTES + 16 * 2**20
    assert peak_bytes(lambda: store.save(2, values, {})) < room
    strided = [Fragment("w", (count // 2,), 0, values[0].values[::2], True)]
    assert peak_bytes(lambda: store.save(3, strided, {})) < room

    def in_background() -> None:
        assert store.save_async(4, values, {}).result()

    assert 4 * count <= peak_bytes(in_background) < 4 * count + room
    assert peak_bytes(in_background) < room, "buffers are kept"
    path = folder / "step-00000004"
    assert peak_bytes(lambda: store.load(path, values)) < room
    assert peak_bytes(lambda: store.load(path, half_values)) < room, "converted in chunks"
    assert peak_bytes(store.find_latest) < room


def test_the_extra_memory_is_what_is_promised(tmp_path: Path) -> None:
    mp.start_processes(stay_small, (tmp_path,), nprocs=1, start_method="forkserver")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_copies_from_a_card_are_pinned_and_complete(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    values = torch.arange(2**24, dtype=torch.float32, device="cuda")
    fragment = Fragment("w", (2**24,), 0, values, True)
    for step in (1, 2):
        pending = store.save_async(step, [fragment], {})
        values.add_(1)
        assert pending.result()
        assert torch.equal(
            load_tensor(tmp_path / f"step-{step:08d}", store.check(tmp_path / f"step-{step:08d}"), "w"),
            values.cpu() - 1,
        )
    assert all(buffer.is_pinned() for buffer in store._buffers._buffers.values())
    store.load(tmp_path / "step-00000001", [fragment])
    assert torch.equal(values, torch.arange(2**24, device="cuda"))


def left_alone(rank: int, folder: Path) -> None:
    background = dist.new_group(backend="gloo")
    store = CheckpointStore(folder, background_group=background)
    assert store.save(1, half(1, rank), {})
    if rank == 1:
        os._exit(3)
    pending = store.save_async(2, half(2, rank), {})
    with pytest.raises(RuntimeError):
        pending.result()
    assert [path.name for path in folder.glob("step-????????")] == ["step-00000001"]
    (folder / "knew").touch()
    os._exit(0)


def test_a_rank_that_dies_leaves_no_one_waiting_for_its_part(tmp_path: Path) -> None:
    arguments = (2, left_alone, tmp_path / "run", tmp_path / "meet")
    context = mp.start_processes(enter, arguments, nprocs=2, join=False, start_method="forkserver")
    context.processes[0].join(60)
    assert context.processes[0].exitcode == 0 and (tmp_path / "run" / "knew").exists()
    context.processes[1].join(60)
    # What it had begun does not stop the next start.
    store = CheckpointStore(tmp_path / "run")
    assert value_of(store) == 1 and store.save(2, constant(2.0), {}) and value_of(store) == 2


def fail_everywhere(rank: int, folder: Path) -> None:
    os.environ["RANK"] = str(rank)
    store = CheckpointStore(folder, background_group=dist.new_group(backend="gloo"))
    step = 1
    assert store.save(step, half(step, rank), {})
    for culprit in (0, 1):
        for point in (*POINTS, *PRUNING):
            for in_background, action in ((True, "raise"), (False, "full")):
                step += 1
                if point == "save.supersede" and rank == 0:
                    shutil.copytree(folder / f"step-{step - 1:08d}", folder / f"step-{step + 1:08d}")
                dist.barrier()
                os.environ["KABRN_FAULT"] = f"{point}@{culprit}:{action}"
                if in_background:
                    saved = store.save_async(step, half(step, rank), {}).result()
                else:
                    saved = store.save(step, half(step, rank), {})
                del os.environ["KABRN_FAULT"]
                # Only rank 0 commits and prunes; pruning comes after the commit and fails nothing.
                fails = point not in PRUNING and (culprit == 0 or point in ("save.begin", "save.written"))
                assert saved is not fails, (culprit, point, action)
                dist.barrier()
                assert not list(folder.glob("*.tmp"))
                if rank == 0:
                    shutil.rmtree(folder / f"step-{step + 1:08d}", ignore_errors=True)
                dist.barrier()
                # Committed is what was renamed, also where making the rename durable failed.
                kept = step if saved or point == "save.renamed" else step - 1
                assert value_of(store) == kept, (culprit, point, action)
                step += not saved
                assert saved or store.save(step, half(step, rank), {})


def test_a_failure_at_any_point_on_any_rank_fails_all_and_harms_nothing(tmp_path: Path) -> None:
    run(2, fail_everywhere, tmp_path)


def full_disk(rank: int, folder: Path) -> None:
    """K3: real writes beyond RLIMIT_FSIZE, on one rank, in either kind of save; the header or the data too large."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = CheckpointStore(folder, background_group=dist.new_group(backend="gloo"))
    count, limits = 50_000, resource.getrlimit(resource.RLIMIT_FSIZE)
    assert store.save(1, half(1, rank, count), {})
    for culprit, room in ((0, 10), (1, 10), (1, 50_000), (0, 100_300)):
        for in_background in (True, False):
            if rank == culprit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            if in_background:
                saved = store.save_async(2, half(2, rank, count), {"long": "x" * 200_000}).result()
            else:
                saved = store.save(2, half(2, rank, count), {"long": "x" * 200_000})
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert saved is False
            assert [path.name for path in sorted(folder.iterdir())] == ["latest", "step-00000001"]
            assert value_of(store, count) == 1
    assert store.save(2, half(2, rank, count), {}) and value_of(store, count) == 2


def test_a_full_disk_on_one_rank_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    run(2, full_disk, tmp_path)


def test_a_folder_that_vanishes_or_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder)

    def vanish() -> Any:
        shutil.rmtree(folder)
        yield from constant(1)

    assert store.save(1, vanish(), {}) is False
    assert store.save(1, constant(1), {}) and value_of(store) == 1
    shutil.rmtree(folder)
    folder.write_text("a file in its place")
    assert store.save(2, constant(2), {}) is False
    assert folder.read_text() == "a file in its place"


def read_only(rank: int, folder: Path) -> None:
    # Root writes anywhere; names are relative, as the folders above are root's alone.
    os.chdir(folder)
    if os.geteuid() == 0:
        os.seteuid(65534)
    store = CheckpointStore(Path())
    assert store.save_async(2, constant(2), {}).result() is False and store.save(2, constant(2), {}) is False
    assert store.find_latest() == Path("step-00000001")
    with pytest.raises(UserError, match="lock: cannot be opened"):
        acquire_lock(Path())


def test_a_folder_without_permission_fails_the_save_alone(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path).save(1, constant(1), {})
    tmp_path.chmod(0o555)
    try:
        mp.start_processes(read_only, (tmp_path,), nprocs=1, start_method="forkserver")
    finally:
        tmp_path.chmod(0o755)


def test_leftovers_block_nothing(tmp_path: Path) -> None:
    """K9: temporary directories of crashed saves, whatever is in them, or a file or a link of such a name."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    folder = tmp_path / "run"
    store = CheckpointStore(folder)
    for step in (1, 2, 3):
        leftover = folder / f"step-{step:08d}.tmp"
        folder.mkdir(exist_ok=True)
        if step == 1:
            leftover.symlink_to(outside)
        elif step == 2:
            leftover.write_text("a file")
        else:
            (leftover / "rank-00000.safetensors" / "deep").mkdir(parents=True)
        (folder / "step-00000009.tmp").mkdir()
        assert store.save(step, constant(step), {}) and value_of(store) == step
        assert not list(folder.glob("*.tmp"))
    assert (outside / "precious").read_text() == "kept"
    # A link of a checkpoint's name is neither found nor pruned away with what it points to.
    shutil.copytree(folder / "step-00000003", outside / "nine")
    (folder / "step-00000009").symlink_to(outside / "nine")
    for step in (4, 5, 6):
        assert store.save(step, constant(step), {}) and value_of(store) == step
    assert (outside / "nine" / "manifest.json").exists()


def save_and_die(rank: int, folder: Path, fault: str, in_background: bool) -> None:
    torch.set_num_threads(1)
    store, values = CheckpointStore(folder), constant(0)
    found = store.find_latest()
    assert found is not None
    os.environ["KABRN_FAULT"] = fault
    manifest = store.load(found, values)
    step = manifest.step + 1
    if in_background:
        store.save_async(step, constant(step), {}).result()
    else:
        store.save(step, constant(step), {})
    raise AssertionError(f"{fault} did not strike")


@pytest.mark.parametrize("in_background", [False, True])
def test_sigkill_at_every_point(tmp_path: Path, in_background: bool) -> None:
    store = CheckpointStore(tmp_path)
    assert all(store.save(step, constant(step), {}) for step in (1, 2, 3))
    expected = 3
    for point in (*POINTS, *PRUNING, *LOADING):
        newer = tmp_path / f"step-{expected + 5:08d}"
        if point == "save.supersede":
            # A copy under a later name: as if the run had been told to go back behind it.
            shutil.copytree(tmp_path / f"step-{expected:08d}", newer)
        arguments = (tmp_path, f"{point}:kill", in_background)
        context = mp.start_processes(save_and_die, arguments, nprocs=1, join=False, start_method="forkserver")
        context.processes[0].join(60)
        assert context.processes[0].exitcode == -signal.SIGKILL, point
        if point in ("save.renamed", *PRUNING):
            expected += 1
        if point == "save.supersede":
            shutil.rmtree(newer)
        assert value_of(store) == expected, point
        expected += 1
        assert store.save(expected, constant(expected), {}) and value_of(store) == expected
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["latest", *(f"step-{step:08d}" for step in (expected - 1, expected))], point


def test_a_lock_that_a_killed_run_leaves_to_its_child_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between fork and exec a child has all that its parent had open; it may outlive the parent by a moment."""
    script = (
        "import os, sys; from pathlib import Path; from kabrn_dist.utils.lock import acquire_lock\n"
        "lock = acquire_lock(Path(sys.argv[1]))\n"
        "if os.fork() == 0:\n    sys.stdin.read(); os._exit(0)\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE)
    assert killed.wait() == -signal.SIGKILL and killed.stdin is not None
    monkeypatch.setattr(lock_module, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(UserError, match=f"process {killed.pid}"):
        acquire_lock(tmp_path)
    monkeypatch.undo()
    threading.Timer(0.3, killed.stdin.close).start()
    acquire_lock(tmp_path).release()


def test_a_second_run_on_one_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K10, and nothing stale is left by a holder that was killed."""
    monkeypatch.setattr(lock_module, "PATIENCE_SECONDS", 0.2)
    folder = tmp_path / "run"
    script = (
        "import sys, time; from pathlib import Path; from kabrn_dist.utils.lock import acquire_lock\n"
        "lock = acquire_lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid}.*stop it first"):
            acquire_lock(folder)
    finally:
        other.kill()
        other.wait()
    with acquire_lock(folder) as lock, pytest.raises(UserError, match=f"process {os.getpid()}"):
        acquire_lock(folder)
    lock.release()
    acquire_lock(folder).release()
    (folder / "lock").unlink()
    (tmp_path / "elsewhere").write_text("kept")
    (folder / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="lock"):
        acquire_lock(folder)
    assert (tmp_path / "elsewhere").read_text() == "kept"
