"""What do ternary matrices cost between ranks: bytes, memory and time of a step, shared out in two bits and under ZeRO.

P processes on this machine, gloo, bf16. Each trains one model by ZeRO 1, 2 and 3, and with ternary matrices shared out
(`parallel.shard_ternary`, in two bits and in base 3), with one micro-batch a step and with four. Counted by the
kernel: bytes of the rank that sends most, in one optimizer step; and of one gathering of the codes alone, beside an
all-gather of the same weights in bf16. Memory: tensors that a rank holds between two steps, each storage once.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.report import Report, run
from benchmarks.wire import sent_by
from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.losses import StepTotals
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.launch_env import LaunchEnv, free_port
from kabrn_dist.distributed.mesh import Mesh, make_mesh
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.model.mixkabrn import build_model
from kabrn_dist.planner.count import count_parameters

WAYS: dict[str, dict[str, Any]] = {
    "shards": {"zero_stage": 1, "shard_ternary": True},
    "shards in base 3": {"zero_stage": 1, "shard_ternary": True, "ternary_wire_format": "base_three"},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
}
MICRO_BATCHES = (1, 4)
LENGTH, MICRO_BATCH = 64, 4
MILLI, MEGA = 1e3, 1e-6

# By name, of the worst rank.
Figures = dict[str, float]


def questions(report: Report, quick: bool) -> None:
    """Fill the report for two processes and, unless quick, for four."""
    for world in (2,) if quick else (2, 4):
        figures = run_processes(world, 128 if quick else 256, 2 if quick else 6)
        for micro in MICRO_BATCHES:
            for way in list(WAYS)[1:]:
                for what, unit in (("sent", "MB"), ("time", "ms")):
                    ours, rival = (figures[f"{name} {micro} {what}"] for name in ("shards", way))
                    here = f"P={world}, {micro} micro-batch{'es' if micro > 1 else ''} a step, {what}, rival: {way}"
                    report.compare(here, ours, rival, unit)
        for way in list(WAYS)[1:]:
            report.compare(f"P={world} held, rival: {way}", figures["shards held"], figures[f"{way} held"], "MB")
        whole = figures["bf16 gathered"]
        for way in ("shards", "shards in base 3"):
            report.compare(
                f"P={world} weights of {way}, rival: bf16 all-gather", figures[f"{way} gathered"], whole, "MB"
            )
        over = figures["shards gathered"] / whole
        report.at_most(f"P={world} bytes of weights over a bf16 all-gather of them", over, 0.130)
        times = figures["shards 4 gathers"]
        report.at_most(f"P={world} gatherings of codes in a step of four micro-batches", times, 1.0)
        report.at_most(f"P={world} resident bytes a ternary weight", figures["shards resident"], 0.3)


def run_processes(world: int, width: int, steps: int) -> Figures:
    """Return the figures of the worst rank."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        multiprocessing.spawn(_rank, (world, free_port(), width, steps, result), nprocs=world)
        figures: Figures = json.loads(result.read_text())
    return figures


def configure(width: int, way: str, world: int, micro: int) -> Config:
    """A model whose weights are nearly all ternary."""
    retention = {"num_heads": 4, "key_dim": width // 4, "value_dim": width // 4}
    experts = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 2 * width}
    model = {"vocab_size": 257, "hidden_size": width, "layers": 4, "retention": retention, "experts": experts}
    batch = {
        "steps": 100,
        "global_batch_size": MICRO_BATCH * world * micro,
        "micro_batch_size": MICRO_BATCH,
        "precision": "bf16",
    }
    return Config.model_validate(
        {
            "run": {"folder": "unused"},
            "data": {"path": "unused", "sequence_length": LENGTH},
            "model": model,
            "parallel": {"bucket_size": 5_000_000, **WAYS[way]},
            "optimizer": {"learning_rate": 1e-3},
            "training": batch,
        }
    )


def _rank(rank: int, world: int, port: int, width: int, steps: int, result: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    figures: Figures = {}
    place = LaunchEnv(rank, world, rank, world)
    with init_distributed(place) as device:
        for way in WAYS:
            for micro in MICRO_BATCHES:
                config = configure(width, way, world, micro)
                mesh = make_mesh(place, device, 1)
                engine = Engine(build_model(config, mesh), config, mesh)
                figures |= {f"{way} {name}": value for name, value in _measure(engine, mesh, micro, steps).items()}
                engine.close()
                del engine
                gc.collect()
        figures["bf16 gathered"] = sent_by(_plain_gather(width, world)) * MEGA
        worst = torch.tensor(list(figures.values()), dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if rank == 0:
            result.write_text(json.dumps(dict(zip(figures, worst.tolist(), strict=True))))
        dist.barrier()


def _measure(engine: Engine, mesh: Mesh, micro: int, steps: int) -> Figures:
    """Bytes, time and memory of one way to train."""
    batches = [_draw(mesh.rank * micro + number) for number in range(micro)]
    step = _step(engine, batches, mesh.world_size)
    for _ in range(2):
        step()
    before = engine.shards.gatherings if engine.shards else 0
    figures = {f"{micro} sent": sent_by(step) * MEGA}
    gathers = engine.shards.gatherings - before if engine.shards else 0
    times = []
    for _ in range(steps):
        dist.barrier()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    figures[f"{micro} time"] = min(times) * MILLI
    figures["held"] = held_bytes() * MEGA
    if engine.shards is None:
        return figures
    shards = engine.shards
    weights = sum(shard.ranks * shard.count for shard in shards.by_name.values())
    figures |= {f"{micro} gathers": gathers, "resident": shards.resident_bytes() / weights}
    figures["gathered"] = sent_by(shards.gather) * MEGA
    return figures


def _plain_gather(width: int, world: int) -> Callable[[], object]:
    """An all-gather of as many weights as are ternary, in bf16."""
    weights = count_parameters(configure(width, "shards", world, 1).model).ternary
    piece = torch.zeros(-(-weights // world), dtype=torch.bfloat16)
    whole = torch.empty(world * len(piece), dtype=torch.bfloat16)
    return lambda: dist.all_gather_into_tensor(whole, piece)


def _draw(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 257, (MICRO_BATCH, LENGTH + 1), generator=generator)
    zeros, places = torch.zeros(MICRO_BATCH, LENGTH, dtype=torch.int64), torch.arange(LENGTH).repeat(MICRO_BATCH, 1)
    return Batch(tokens[:, :-1], tokens[:, 1:], zeros, places, zeros[:, 0])


def _step(engine: Engine, batches: list[Batch], ranks: int) -> Callable[[], None]:
    sequences = MICRO_BATCH * len(batches) * ranks
    totals = StepTotals(sequences * LENGTH, sequences * LENGTH, sequences, ranks)

    def step() -> None:
        for batch in batches:
            engine.forward_backward(batch, totals)
        engine.optimizer_step(1e-3, 0.1)

    return step


def held_bytes() -> int:
    """Of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    run("Ternary matrices between ranks", questions)
