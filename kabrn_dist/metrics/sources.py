"""Loss and bits per byte of each source of the data.

Shapes: S sources, B rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kabrn_dist.data.dataset import Batch, TokenDataset
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.model.mixkabrn import BatchStats


class SourceSums:
    """Sums over rows by source, added up over micro-batches and ranks, in float64 on the host.

    The sums are the same for every world size, slicing of sequences and split into micro-batches, to rounding.
    """

    def __init__(self, sources: int) -> None:
        self._sums = torch.zeros(sources, 3, dtype=torch.float64)

    def add(self, batch: Batch, rows: Tensor, text_bytes: Tensor | None = None) -> None:
        """Add a micro-batch on the host, or this rank's slice of one.

        Args:
            batch: the micro-batch.
            rows: [B] nats of each row, `BatchStats.rows`, on any device.
            text_bytes: [B] UTF-8 bytes of each row's targets; None if bits per byte are not needed.
        """
        texts = torch.zeros(len(rows)) if text_bytes is None else text_bytes
        amounts = torch.stack([part.cpu().double() for part in (rows, (batch.targets >= 0).sum(1), texts)], 1)
        for source in batch.sources.unique().tolist():
            self._sums[source] += amounts[batch.sources == source].sum(0)

    def all_reduce(self, mesh: Mesh) -> Tensor:
        """Return nats, targets and text bytes of each source over all ranks, float64 [S,3] on the host. Collective."""
        return mesh.all_reduce_sum(self._sums.to(mesh.device)).cpu()


def measure_step(
    mesh: Mesh, data: TokenDataset, batches: Sequence[Batch], sums: Sequence[BatchStats], consumed: int
) -> dict[str, float]:
    """Return what to log of a step's sources. Collective.

    For each source: `loss`, nats per target, if the step had any of it; `share`, its fraction of the step's targets, if
    it had any;
    `tokens` drawn in the first `consumed` sequences of the run; `epochs`, passes over the source in these.

    Args:
        mesh: all ranks.
        data: the training split.
        batches: this rank's micro-batches, on the host.
        sums: the model's statistics of each of them.
        consumed: sequences that the run has drawn, this step included.
    """
    parts = SourceSums(len(data.sequences_per_source))
    for batch, each in zip(batches, sums, strict=True):
        parts.add(batch, each.rows)
    total = parts.all_reduce(mesh)
    everything = float(total[:, 1].sum())
    drawn_all = data.sequences_drawn(consumed)
    values: dict[str, float] = {}
    for number, name in enumerate(data.corpus.names):
        nats, targets, _ = total[number].tolist()
        drawn, count = drawn_all[number], data.sequences_per_source[number]
        if not count:
            continue
        if targets:
            values[f"source/{name}/loss"] = nats / targets
        if everything:
            values[f"source/{name}/share"] = targets / everything
        values |= {
            f"source/{name}/tokens": float(drawn * data.sequence_length),
            f"source/{name}/epochs": drawn / count,
        }
    return values


def validation_values(names: Sequence[str], sums: Tensor) -> dict[str, float]:
    """Return nats per target and bits per byte of each source, from the [S,3] of `SourceSums.all_reduce`."""
    values: dict[str, float] = {}
    for name, (nats, targets, text_bytes) in zip(names, sums.tolist(), strict=True):
        if targets:
            values[f"validation/{name}/loss"] = nats / targets
        if text_bytes:
            values[f"validation/{name}/bits_per_byte"] = nats / math.log(2) / text_bytes
    return values
