"""What a sequence-parallel retention layer sends, as the kernel counts it: the bytes of every TCP socket of a rank.

Nothing is patched and no collective is trusted to send what its name says; gloo's message headers are in the count.
A real forward and backward pass over real slices runs; the figure is that of the rank that sends most.

The formula, for a layer, a direction and a rank: n states of B·H·(K·V + 1) fp32 values, with n = 1 for the ring,
⌈log₂P⌉ for the scan and P − 1 for the all-gather; the length of a slice is not in it. Ulysses instead turns slices of
L tokens into slices of heads by all-to-all: q, k, v there and o back, of which a share of (P − 1)/P leaves a rank,
B·L·H·(2K + 2V)·(P − 1)/P values of the compute dtype (bf16 here) each way; and it needs P ≤ H.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.report import Report
from benchmarks.wire import sent_by
from kabrn_dist.distributed.launch_env import free_port
from kabrn_dist.distributed.state_scan import ExchangeMethod, SequenceLink
from kabrn_dist.ops.retention_chunkwise import retention_slice

HEADS, KEY, VALUE = 2, 32, 64
# So slow that a state still matters after 64K tokens: of faster heads less would be sent.
LOG_DECAYS = (-(2.0**-14), -(2.0**-16))
LENGTHS = (1024, 65536)
EXCHANGES: tuple[ExchangeMethod, ...] = ("ring", "scan", "allgather")
SHORT, LONG = LENGTHS


def question(report: Report, quick: bool) -> None:
    """Rows and aims for each degree and exchange."""
    degrees = [2, 4] if quick else [2, 4, 8]
    counts = count(degrees)
    for degree in degrees:
        for exchange in EXCHANGES:
            sent = {length: counts[f"{degree} {exchange} {length}"] for length in LENGTHS}
            name = f"wire P={degree} {exchange}"
            for length in LENGTHS:
                ulysses = length * HEADS * (2 * KEY + 2 * VALUE) * (degree - 1) / degree * 2
                a_rank = f"{length // 1024}K tokens a rank"
                report.compare(f"{name}, {a_rank}, rival: Ulysses", max(sent[length]), ulysses, "B")
            formula = states_sent(exchange, degree) * HEADS * (KEY * VALUE + 1) * 4
            report.compare(f"{name}, rival: its formula", max(sent[LONG]), formula, "B")
            worst = max(abs(ways / formula - 1) for length in LENGTHS for ways in sent[length])
            report.at_most(f"{name}: share off the formula, either way and length", worst, 0.02)
            by_length = [sent[LONG][way] / sent[SHORT][way] for way in (0, 1)]
            report.at_most(f"{name}: bytes at 64K tokens over those at 1K", max(by_length), 1.001)


def states_sent(exchange: ExchangeMethod, degree: int) -> int:
    """By the rank that sends most."""
    return {"ring": 1, "scan": math.ceil(math.log2(degree)), "allgather": degree - 1}[exchange]


def count(degrees: Sequence[int]) -> dict[str, list[int]]:
    """Bytes forward and backward of the busiest rank, by "degree exchange length"."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "counts.json"
        multiprocessing.spawn(_rank, (tuple(degrees), free_port(), result), nprocs=max(degrees))
        counts: dict[str, list[int]] = json.loads(result.read_text())
    return counts


def _rank(rank: int, degrees: tuple[int, ...], port: int, result: Path) -> None:
    """One process. Smaller groups are the first ranks of the largest; the others wait."""
    torch.set_num_threads(1)
    world = max(degrees)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    counts = {}
    for degree in degrees:
        group = dist.new_group(list(range(degree)))
        for exchange in EXCHANGES:
            for length in LENGTHS:
                sent = torch.tensor(_layer(group, degree, exchange, length) if rank < degree else [0, 0])
                dist.all_reduce(sent, dist.ReduceOp.MAX)
                counts[f"{degree} {exchange} {length}"] = sent.tolist()
    if rank == 0:
        result.write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


def _layer(group: dist.ProcessGroup, degree: int, exchange: ExchangeMethod, length: int) -> list[int]:
    """Bytes this rank sends forward and backward."""
    link = SequenceLink(group, degree, LOG_DECAYS, exchange)
    q, k, v = (
        torch.randn(1, HEADS, length, width, dtype=torch.bfloat16, requires_grad=True) for width in (KEY, KEY, VALUE)
    )
    documents = torch.zeros(1, length, dtype=torch.int64)
    starts = torch.tensor([dist.get_rank(group) == 0])
    outs = []

    def forward() -> None:
        outs.append(retention_slice(q, k, v, torch.tensor(LOG_DECAYS), documents, starts, link))

    return [sent_by(way, group) for way in (forward, lambda: outs[0].sum().backward())]
