"""How well each source of the data is learned: its loss, apart from the others'.

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
    """Sums over rows by their source, added up over micro-batches and ranks, in float64 on the host.

    They come out the same for every world size, slicing of sequences and split into micro-batches, to rounding.
    """

    def __init__(self, sources: int) -> None:
        self._sums = torch.zeros(sources, 3, dtype=torch.float64)

    def add(self, batch: Batch, rows: Tensor, text_bytes: Tensor | None = None) -> None:
        """Add a micro-batch, or this rank's slice of one, that lies on the host.

        Args:
            rows: [B] nats of each row, `Sums.rows`, on any device.
            text_bytes: [B] UTF-8 bytes of each row's targets, where they are wanted.
        """
        texts = torch.zeros(len(rows)) if text_bytes is None else text_bytes
        amounts = torch.stack([part.cpu().double() for part in (rows, (batch.targets >= 0).sum(1), texts)], 1)
        for source in batch.sources.unique().tolist():
            self._sums[source] += amounts[batch.sources == source].sum(0)

    def take(self, mesh: Mesh) -> Tensor:
        """Nats, targets and text bytes of each source over all ranks, float64 [S,3] on the host. Collective."""
        return mesh.all_reduce_sum(self._sums.to(mesh.device)).cpu()


def measure_step(
    mesh: Mesh, data: TokenDataset, batches: Sequence[Batch], sums: Sequence[BatchStats], consumed: int
) -> dict[str, float]:
    """What to log of a step's sources: this rank's micro-batches and what the model said of them. Collective.

    By name: `loss`, nats a target, of sources that the step had; `share` of the step's targets; `tokens` drawn in the
    first `consumed` sequences of the run; `epochs`, passes over the source in these.
    """
    parts = SourceSums(len(data.sequences_per_source))
    for batch, each in zip(batches, sums, strict=True):
        parts.add(batch, each.rows)
    total = parts.take(mesh)
    everything = max(1.0, float(total[:, 1].sum()))
    drawn_all = data.sequences_drawn(consumed)
    values: dict[str, float] = {}
    for number, name in enumerate(data.corpus.names):
        nats, targets, _ = total[number].tolist()
        drawn, count = drawn_all[number], data.sequences_per_source[number]
        if not count:
            continue
        if targets:
            values[f"source/{name}/loss"] = nats / targets
        values |= {
            f"source/{name}/share": targets / everything,
            f"source/{name}/tokens": float(drawn * data.sequence_length),
            f"source/{name}/epochs": drawn / count,
        }
    return values


def validation_values(names: Sequence[str], sums: Tensor) -> dict[str, float]:
    """What to log of a validation's `SourceSums.take` [S,3]: nats a target and bits a byte of each source's text."""
    values: dict[str, float] = {}
    for name, (nats, targets, text_bytes) in zip(names, sums.tolist(), strict=True):
        if targets:
            values[f"validation/{name}/loss"] = nats / targets
        if text_bytes:
            values[f"validation/{name}/bits_per_byte"] = nats / math.log(2) / text_bytes
    return values
