"""The checkpoint store against other partitions, damage, full disks and SIGKILL."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from kabrn_dist.checkpoint.fragment import Fragment, overlapping_ranges
from kabrn_dist.checkpoint.store import CheckpointStore, load_tensor, read_manifest
from kabrn_dist.utils.errors import UserError

multiprocessing.set_forkserver_preload(["torch", "pytest", "kabrn_dist.checkpoint.store"])

# Experts stacked, a matrix, an empty tensor, a scalar, a second dtype.
SHAPES = {"up/master": (6, 5, 7), "embed/master": (31, 8), "none/exp_avg": (0, 4), "scale/master": ()}
SHAPES["embed/working"] = (31, 8)
STATE = {"cursor": {"consumed": 2**60, "seed": 7}, "rate": 0.1, "note": "é\ud7ff", "list": [1, None, True]}


def logical(name: str) -> torch.Tensor:
    dtype = torch.bfloat16 if name.endswith("working") else torch.float32
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(SHAPES[name], generator=generator).to(dtype)


def cut(rank: int, world: int, seed: int, filled: bool) -> list[Fragment]:
    """This rank's share of a random partition (some pieces empty), and a copy of what rank 0 owns first."""
    generator, fragments = random.Random(seed), []
    for name, shape in SHAPES.items():
        total = prod(shape)
        bounds = [0, *sorted(generator.choices(range(total + 1), k=3 * world - 1)), total]
        owners = [generator.randrange(world) for _ in bounds[1:]]
        flat = logical(name).flatten()
        flat = flat if filled else torch.full_like(flat, torch.nan)
        for (start, stop), owner in zip(pairwise(bounds), owners, strict=True):
            if owner == rank:
                fragments.append(Fragment(name, shape, start, flat[start:stop].clone(), True))
        fragments.append(Fragment(name, shape, 0, flat[: total // 2].clone(), False))
    return fragments


def constant(value: float, count: int = 1000, start: int = 0, stop: int | None = None) -> list[Fragment]:
    stop = count if stop is None else stop
    return [Fragment("w", (count,), start, torch.full((stop - start,), value), True)]


def run(world: int, work: Callable[[int, Path], None], folder: Path) -> None:
    """`work(rank, folder)` on `world` gloo processes; forkserver, as spawn imports torch in each."""
    mp.start_processes(enter, (world, work, folder / "run", folder / "meet"), nprocs=world, start_method="forkserver")


def enter(rank: int, world: int, work: Callable[[int, Path], None], folder: Path, meet: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    work(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


def reseal(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit a manifest as a hostile author would, with a matching sha256."""
    sealed = json.loads((path / "manifest.json").read_text())
    edit(sealed["manifest"])
    canonical = json.dumps(sealed["manifest"], sort_keys=True, separators=(",", ":"))
    sealed["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(sealed))


def intersect_naive(start: int, stop: int, bounds: Sequence[int]) -> list[tuple[int, int, int]]:
    ranges = enumerate(pairwise(bounds))
    both = ((i, max(start, low), min(stop, high)) for i, (low, high) in ranges)
    return [(i, first, last) for i, first, last in both if first < last]


def test_intersect() -> None:
    generator = random.Random(0)
    for _ in range(2000):
        total = generator.randrange(12)
        bounds = [0, *sorted(generator.choices(range(total + 1), k=generator.randrange(5))), total]
        start, stop = sorted(generator.choices(range(total + 1), k=2))
        assert overlapping_ranges(start, stop, bounds) == intersect_naive(start, stop, bounds)


def repartition(rank: int, folder: Path) -> None:
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 3, 4)}
    if rank < 3:
        saved = CheckpointStore(folder, group=groups[3]).save(12, cut(rank, 3, 0, True), STATE)
        assert saved
    dist.barrier()
    for world in (1, 2, 4):
        if rank >= world:
            continue
        store = CheckpointStore(folder, group=groups[world])
        path, fragments = store.find_latest(), cut(rank, world, world, False)
        assert path == folder / "step-00000012"
        manifest = store.load(path, fragments)
        assert manifest.state == STATE and (manifest.step, manifest.world_size) == (12, 3)
        for held in fragments:
            expected = logical(held.name).flatten()[held.offset : held.offset + held.values.numel()]
            assert torch.equal(held.values, expected), held.name
    with pytest.raises(UserError, match=r"rank 2: .*\(5,\).*\(4,\)|rank 2: .*'absent'"):
        wanted = [Fragment("absent", (4,), 0, torch.zeros(4), False)] if rank == 2 else []
        CheckpointStore(folder).load(folder / "step-00000012", wanted)


def test_any_partition_loads_what_three_ranks_saved(tmp_path: Path) -> None:
    run(4, repartition, tmp_path)
    path = tmp_path / "run" / "step-00000012"
    manifest = read_manifest(path)
    for name in SHAPES:
        assert torch.equal(load_tensor(path, manifest, name), logical(name))
    # Other tools read the files too.
    assert sum(len(load_file(path / file.name)) for file in manifest.files) == sum(
        len(tensor.pieces) for tensor in manifest.tensors.values()
    )


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def edit_state(file: Path) -> None:
    file.write_text(file.read_text().replace("0.5", "0.6"))


@pytest.mark.parametrize(
    ("damage", "name"),
    [(truncate, "rank-00000.safetensors"), (flip, "rank-00000.safetensors"), (edit_state, "manifest.json")]
    + [(os.remove, name) for name in ("rank-00000.safetensors", "manifest.json")],
)
def test_find_passes_over_damage_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], name: str
) -> None:
    store = CheckpointStore(tmp_path)
    assert store.find_latest() is None
    assert all(store.save(step, constant(step), {"rate": 0.5}) for step in (1, 2))
    assert store.find_latest() == tmp_path / "step-00000002"
    damage(tmp_path / "step-00000002" / name)
    assert store.find_latest() == tmp_path / "step-00000001"
    assert "step-00000002" in caplog.text and name in caplog.text


def test_a_name_that_says_another_step_is_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert all(store.save(step, constant(step), {}) for step in (1, 2))
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    found, faults = store.survey()
    assert found == tmp_path / "step-00000002"
    assert list(faults) == ["step-00000009"] and "rename the folder to step-00000001" in faults["step-00000009"]
    # A copy elsewhere, under a name that says no step, is as good as the original.
    shutil.copytree(tmp_path / "step-00000009", tmp_path / "copy")
    assert store.check(tmp_path / "copy").step == 1


def test_prune_leftovers_replace_and_supersede(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=4)
    (tmp_path / "step-00000002.tmp").mkdir()
    (tmp_path / "step-00000002.tmp" / "rank-00000.safetensors").write_bytes(b"half")
    for step in range(1, 4):
        assert store.save(step, constant(step), {})
    store.load(tmp_path / "step-00000002", constant(0))
    for step in range(4, 12):
        assert store.save(step, constant(step), {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", *(f"step-{step:08d}" for step in (2, 4, 8, 10, 11))]
    assert (tmp_path / "latest").read_text() == "step-00000011\n"

    truncate(tmp_path / "step-00000011" / "rank-00000.safetensors")
    assert store.save(10, constant(-10.0), {})
    assert (tmp_path / "step-00000011.superseded").is_dir() and "step-00000011" in caplog.text
    values = constant(0)
    store.load(store.find_latest() or tmp_path, values)
    assert values[0].values.unique().tolist() == [-10.0]
    # A crash between the two renames of a replacing save leaves only `.old`.
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000010.old")
    assert store.find_latest() == tmp_path / "step-00000010.old"
    with pytest.raises(UserError, match="keep_last: 1"):
        CheckpointStore(tmp_path, keep_last=1)


def full_disk(rank: int, folder: Path) -> None:
    store = CheckpointStore(folder)
    mine = {"count": 50_000, "start": 25_000 * rank, "stop": 25_000 * (rank + 1)}
    assert store.save(1, constant(1.0, **mine), {})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    assert store.save(2, constant(2.0, **mine), {}) is False
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(folder.glob("*.tmp"))
    found = store.find_latest()
    assert found == folder / "step-00000001", found
    broken = [held for held in constant(2.0, **mine) if rank == 0]
    assert store.save(2, broken, {}) is False
    assert store.save(2, constant(2.0, **mine), {"only rank 0's": rank})
    assert store.check(folder / "step-00000002").state == {"only rank 0's": 0}


def test_a_rank_that_cannot_write_fails_the_save_everywhere(tmp_path: Path) -> None:
    run(2, full_disk, tmp_path)


@pytest.mark.parametrize(
    ("fragments", "reason"),
    [
        (constant(1.0, 9, 0, 4) + constant(1.0, 9, 5, 9), "elements 4 to 5 are in no piece"),
        (constant(1.0, 9, 0, 5) + constant(1.0, 9, 4, 9), "element 4 is in two pieces"),
        (constant(1.0, 9, 0, 8), "pieces hold 8 elements"),
        (constant(1.0, 9) + constant(1.0, 9), "owned twice"),
        ([Fragment("w", (9,), 3, torch.ones(9), True)], "elements 3 to 12"),
        ([*constant(1.0, 9), Fragment("w", (3, 3), 0, torch.ones(0), True)], "same logical tensor"),
        ([Fragment("w", (9,), 0, torch.ones(9), False)], "pieces hold 0 elements"),
    ],
)
def test_wrong_cover_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fragments: list[Fragment], reason: str
) -> None:
    assert CheckpointStore(tmp_path).save(1, fragments, {}) is False
    assert reason in caplog.text and not list(tmp_path.iterdir())
    assert CheckpointStore(tmp_path).save(1, constant(1.0), {"rate": float("nan")}) is False
    assert CheckpointStore(tmp_path).save(1, constant(1.0), {"text": "\ud800"}) is False
    assert not list(tmp_path.iterdir())


def point_outside(manifest: dict[str, Any]) -> None:
    manifest["files"][0]["name"] = "../other/rank-00000.safetensors"


def inflate(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["w"]["shape"] = [2**45]
    manifest["tensors"]["w"]["pieces"][0]["count"] = 2**45


def inflate_file(manifest: dict[str, Any]) -> None:
    inflate(manifest)
    manifest["files"][0]["bytes"] = 2**48


def shift(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["w"]["pieces"][0]["offset"] = -(2**62)


@pytest.mark.parametrize("edit", [point_outside, inflate, inflate_file, shift])
def test_hostile_manifests_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    store = CheckpointStore(tmp_path / "run")
    assert store.save(1, constant(1.0), {})
    path = tmp_path / "run" / "step-00000001"
    shutil.copytree(path, tmp_path / "run" / "other")
    reseal(path, edit)
    with pytest.raises(UserError, match="use another checkpoint"):
        read_manifest(path)
    assert store.find_latest() is None


def test_missing_and_other_shape(tmp_path: Path) -> None:
    store, path = CheckpointStore(tmp_path), tmp_path / "step-00000001"
    assert store.save(1, constant(1.5), {})
    wanted = [*constant(0.0), Fragment("new", (3,), 0, torch.zeros(3, dtype=torch.float64), True)]
    with pytest.raises(UserError, match="'new'"):
        store.load(path, wanted)
    assert not wanted[0].values.any()
    store.load(path, wanted, missing="keep")
    assert (wanted[0].values == 1.5).all() and not wanted[1].values.any()
    with pytest.raises(UserError, match=r"\(1000,\) in the checkpoint and \(10,\) in this run"):
        store.load(path, constant(0.0, 10))
    half = [Fragment("w", (1000,), 10, torch.zeros(7, dtype=torch.bfloat16), False)]
    store.load(path, half)
    assert (half[0].values == 1.5).all()


def save_for_ever(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = CheckpointStore(folder)
    first = store.find_latest()
    for step in range(int(first.name[5:13]) if first else 1, 10**6):
        assert store.save(step, constant(step, 300_000), {"step": step})


def test_sigkill_never_leaves_a_wrong_checkpoint(tmp_path: Path) -> None:
    store, generator = CheckpointStore(tmp_path), random.Random(0)
    for _ in range(40):
        context = mp.start_processes(save_for_ever, (tmp_path,), nprocs=1, join=False, start_method="forkserver")
        before = store.find_latest()
        deadline = time.monotonic() + 20
        while store.find_latest(verify=False) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.05))
        context.processes[0].kill()
        context.processes[0].join()
        path, values = store.find_latest(), constant(0.0, 300_000)
        assert path is not None
        manifest = store.load(path, values)
        assert manifest.state == {"step": manifest.step} and (values[0].values == manifest.step).all()
