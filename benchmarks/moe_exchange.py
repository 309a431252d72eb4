"""What expert parallelism costs over two and four processes: time of a step, bytes on the wire, share in exchange.

Gloo over TCP, one thread a process, one layer of top-2 of 8 experts in bf16, so many tokens on each rank. Ours with
ternary experts sends int8 or, for comparison, bf16; with plain experts, as deepspeed's are, it sends bf16. Bytes are
those that the kernel counts on the sockets of the rank that sends most, forward and backward, for all alike. Time in
exchange is what the rank that waits longest spends in all-to-all and all-reduce, and waiting for them to end, for all
alike; there a rank also waits for slower ones, of which there are many where processes share cores.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks import moe_rivals as rivals
from benchmarks.moe_inputs import Function, Inputs, Shape, both_passes
from benchmarks.moe_rivals import Own
from benchmarks.report import Report
from benchmarks.wire import sent_by
from kabrn_dist.distributed.all_to_all import ExpertLink, Traffic
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.launch_env import free_port
from kabrn_dist.utils.malloc import keep_freed_memory

# Ours in each of its ways: experts, int8 there, int8 back.
OURS = {
    "int8": (Own("swiglu", quantized=True), True, False),
    "int8 both ways": (Own("swiglu", quantized=True), True, True),
    "bf16": (Own("swiglu", quantized=True), False, False),
    "plain experts": (Own("swiglu", quantized=False), False, False),
}
DEEPSPEED = "deepspeed dropless"
ROWS = (("", "seconds", 1e3, "ms"), (" in exchange", "exchange", 100, "%"), (" wire", "sent", 1, "B"))

# By name of a layer: seconds of a step, share of it in exchange, bytes sent, and by our own count all and dispatched.
Figures = dict[str, dict[str, float]]


def question(report: Report, quick: bool) -> None:
    """Rows and aims for two and four processes, quickly for two."""
    tokens, rounds = (256, 3) if quick else (2048, 10)
    for world in (2,) if quick else (2, 4):
        figures = run_processes(world, tokens, rounds)
        here = f"P={world}"
        pairs = [("int8", rival) for rival in figures if rival != "int8"] + [("plain experts", DEEPSPEED)]
        for ours, rival in pairs:
            for what, key, factor, unit in ROWS:
                pair = (figures[name][key] * factor for name in (ours, rival))
                report.compare(f"{here} {ours}{what}, rival: {rival}", next(pair), next(pair), unit)
        wire_aims(report, here, figures)
        faster = figures[DEEPSPEED]["seconds"] / figures["plain experts"]["seconds"]
        report.at_least(f"{here}: times faster than deepspeed, plain experts", faster, 1.0)


def wire_aims(report: Report, here: str, figures: Figures) -> None:
    """Add the aims on bytes."""
    for name in OURS:
        counted, sent = figures[name]["counted"], figures[name]["sent"]
        report.at_most(f"{here} {name}: share that our count of bytes is off the wire's", abs(counted / sent - 1), 0.02)
    dispatch = figures["int8"]["dispatched"] / figures["bf16"]["dispatched"]
    report.at_most(f"{here}: bytes of dispatch, int8 over bf16", dispatch, 0.53)
    for name in ("int8", "plain experts"):
        fewer = figures[DEEPSPEED]["sent"] / figures[name]["sent"]
        report.at_least(f"{here} {name}: times fewer bytes than deepspeed", fewer, 1.0)


def run_processes(world: int, tokens: int, rounds: int) -> Figures:
    """Return the figures of all layers, measured on `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        multiprocessing.spawn(_rank, (world, tokens, rounds, free_port(), result), nprocs=world)
        figures: Figures = json.loads(result.read_text())
    return figures


def _rank(rank: int, world: int, tokens: int, rounds: int, port: int, result: Path) -> None:
    """One process."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    figures = _measure(rank, world, tokens, rounds)
    if rank == 0:
        result.write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def _measure(rank: int, world: int, tokens: int, rounds: int) -> Figures:
    shape = Shape(tokens, experts=8, top_k=2, hidden=512)
    x = Inputs(shape, torch.bfloat16, seed=rank)
    placement = ExpertPlacement((shape.experts // world,) * world, rank)
    wires = {
        name: ExpertLink(placement, dist.group.WORLD, None, there, back, Traffic())
        for name, (_, there, back) in OURS.items()
    }
    layers = {name: rivals.ours(x, OURS[name][0], wire) for name, wire in wires.items()}
    layers[DEEPSPEED] = rivals.deepspeed(x, dropless=True, ranks=world, rank=rank)
    steps = {name: both_passes(layer, x) for name, layer in layers.items()}
    figures: Figures = {name: {"seconds": float("inf"), "exchange": 0.0} for name in steps}
    for name, step in steps.items():
        step()
        if name in wires:
            wires[name].traffic.take()
        figures[name]["sent"] = _largest(sent_by(step))[0]
        if name in wires:
            traffic = wires[name].traffic.take()
            counted = _largest(traffic.bytes_sent, traffic.dispatch_bytes)
            figures[name] |= dict(zip(("counted", "dispatched"), counted, strict=True))
    for _ in range(rounds):
        for name, step in steps.items():
            seconds, waited = _largest(*_time(step))
            # The round least disturbed, and its share.
            if seconds < figures[name]["seconds"]:
                figures[name] |= {"seconds": seconds, "exchange": waited / seconds}
    return figures


def _largest(*values: float) -> list[float]:
    """Over all ranks."""
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def _time(step: Function) -> tuple[float, float]:
    """Seconds of a step that all ranks begin together, and those of them in exchange."""
    dist.barrier()
    with _watch() as waits:
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
    return seconds, sum(waits)


class _Work:
    """A collective under way, whose wait is timed."""

    def __init__(self, work: dist.Work, waits: list[float]) -> None:
        self.work, self.waits = work, waits

    def wait(self) -> bool:
        begin = time.perf_counter()
        done: bool = self.work.wait()
        self.waits.append(time.perf_counter() - begin)
        return done


@contextmanager
def _watch() -> Iterator[list[float]]:
    """Yields the seconds of every wait for a collective that an exchange may use, in this process, meanwhile."""
    waits: list[float] = []

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            work = collective(*arguments, **options)
            waits.append(time.perf_counter() - begin)
            return None if work is None else _Work(work, waits)

        return call

    originals = {name: getattr(dist, name) for name in ("all_to_all_single", "all_reduce")}
    try:
        for name, collective in originals.items():
            setattr(dist, name, timed(collective))
        yield waits
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)
