"""The loss on text that the run never trains on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from kabrn_dist.backend.engine import Engine
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import sequence_slice
from kabrn_dist.metrics.activations import watch_saturation
from kabrn_dist.metrics.sources import SourceSums, validation_values
from kabrn_dist.train.datasets import Datasets
from kabrn_dist.utils.fault_injection import inject_fault


class Scores(NamedTuple):
    """Means over the scored tokens: nats a token, bits a byte of text, and what `gzip -9` needs for one.

    By the names of the log: `sources`, loss and bits a byte of each source; `saturation` of each layer's int8 codes.
    """

    loss: float
    bits_per_byte: float
    gzip_bits_per_byte: float
    sources: dict[str, float]
    saturation: dict[str, float]

    def values(self) -> dict[str, float]:
        """By the names of the log."""
        whole = self._asdict()
        return {f"validation/{name}": whole[name] for name in self._fields[:-2]} | self.sources | self.saturation

    def line(self) -> str:
        """For people."""
        return (
            f"validation {self.loss:.4f} nats a token, "
            f"{self.bits_per_byte:.3f} bits per byte (gzip -9: {self.gzip_bits_per_byte:.3f})"
        )


def score(engine: Engine, data: Datasets, config: Config, interrupted: Callable[[], bool]) -> Scores | None:
    """Score the first validation sequences of each source. Collective: all ranks make the same number of passes.

    Args:
        interrupted: asked before each pass; collective, the same on all ranks. True gives up: None is returned.
    """
    mesh, micro = engine.mesh, config.training.micro_batch_size
    positions = data.validation.validation_positions(config.validation.eval_sequences)
    count = len(positions)
    bytes_per_token = torch.from_numpy(data.bytes_per_token)
    sums = SourceSums(len(data.validation.sequences_per_source))
    with watch_saturation(engine.model) as saturation:
        for start in range(0, count, micro * mesh.data_world_size):
            inject_fault("validate")
            if interrupted():
                return None
            # Ranks without a sequence of their own take part with a copy that does not count.
            rows = [start + mesh.data_rank + i * mesh.data_world_size for i in range(micro)]
            batch = data.validation.get([positions[min(row, count - 1)] for row in rows])
            batch = sequence_slice(batch, mesh.sequence_rank, mesh.sequence_parallel)
            counts = torch.tensor([row < count for row in rows])
            saturation.rows = counts
            batch = batch._replace(targets=batch.targets.masked_fill(~counts[:, None], -100))
            text = bytes_per_token[batch.targets.clamp(min=0)].masked_fill(batch.targets < 0, 0).sum(1)
            sums.add(batch, engine.evaluate(batch.to(mesh.device)).rows, text)
    total = sums.take(mesh)
    nats, tokens, text_bytes = total.sum(0).tolist()
    return Scores(
        nats / max(1, tokens),
        nats / math.log(2) / max(1, text_bytes),
        data.gzip_bits_per_byte,
        validation_values(data.validation.corpus.names, total),
        saturation.values(mesh),
    )
