"""Loss and bits per byte on the validation split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kabrn_dist.backend.engine import Engine
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import TokenDataset, sequence_slice
from kabrn_dist.distributed.collectives import run_on_all
from kabrn_dist.metrics.activations import Saturation, watch_saturation
from kabrn_dist.metrics.sources import SourceSums, validation_values
from kabrn_dist.train.datasets import Datasets
from kabrn_dist.utils.fault_injection import inject_fault


class Scores(NamedTuple):
    """Means over the scored tokens.

    Attributes:
        loss: nats per token; not a number if no token was scored, infinite if the sum is not finite.
        bits_per_byte: bits per byte of text; not a number if no text was scored.
        gzip_bits_per_byte: what `gzip -9` needs, for comparison; not a number if that is not recorded.
        sources: loss and bits per byte of each source, by name in the log.
        saturation: fraction of each layer's int8 codes at ±127, by name in the log.
    """

    loss: float
    bits_per_byte: float
    gzip_bits_per_byte: float
    sources: dict[str, float]
    saturation: dict[str, float]

    def values(self) -> dict[str, float]:
        """Return all scores by their names in the log."""
        whole = self._asdict()
        return {f"validation/{name}": whole[name] for name in self._fields[:-2]} | self.sources | self.saturation

    def line(self) -> str:
        """Return the scores as text for the console."""
        if math.isnan(self.loss):
            return "validation: none of its tokens is a target, so there is no loss; raise validation.eval_sequences"
        if math.isinf(self.loss):
            return "validation: the loss is not finite; lower optimizer.learning_rate"
        rival = "" if math.isnan(self.gzip_bits_per_byte) else f" (gzip -9: {self.gzip_bits_per_byte:.3f})"
        text = "" if math.isnan(self.bits_per_byte) else f", {self.bits_per_byte:.3f} bits per byte{rival}"
        return f"validation {self.loss:.4f} nats per token{text}"


def score(engine: Engine, datasets: Datasets, config: Config, is_interrupted: Callable[[], bool]) -> Scores | None:
    """Score the first validation sequences of each source. Collective.

    Args:
        engine: the model in training.
        datasets: both splits of the data.
        config: the whole configuration.
        is_interrupted: called before each forward pass; collective, the same on all ranks. True stops the scoring.

    Returns:
        The scores; None if it was interrupted.

    Raises:
        UserError: on all ranks, if one cannot read.
        ValueError: if there are no validation sequences.
    """
    data = datasets.validation
    if data is None:
        raise ValueError("a run without validation sequences has nothing to score")
    with watch_saturation(engine.model) as saturation:
        total = sum_by_source(engine, data, datasets.bytes_per_token, config, is_interrupted, saturation)
    if total is None:
        return None
    nats, tokens, text_bytes = total.sum(0).tolist()
    if not math.isfinite(nats):
        nats = math.inf
    return Scores(
        nats / tokens if tokens else math.nan,
        nats / math.log(2) / text_bytes if text_bytes else math.nan,
        datasets.gzip_bits_per_byte or math.nan,
        validation_values(data.corpus.names, total),
        saturation.values(engine.mesh),
    )


def sum_by_source(
    engine: Engine,
    data: TokenDataset,
    bytes_per_token: np.ndarray,
    config: Config,
    is_interrupted: Callable[[], bool],
    saturation: Saturation | None = None,
) -> Tensor | None:
    """Add up what the first validation sequences of each source take. Collective.

    Args:
        engine: the model in training.
        data: a validation split.
        bytes_per_token: [vocabulary] UTF-8 bytes that each token stands for.
        config: the whole configuration.
        is_interrupted: as in `score`.
        saturation: is told which rows of a pass count.

    Returns:
        Nats, targets and text bytes of each source, float64 [S,3] on the host; None if it was interrupted.

    Raises:
        UserError: on all ranks, if one cannot read.
    """
    mesh, micro = engine.mesh, config.training.micro_batch_size
    positions = data.validation_positions(config.validation.eval_sequences)
    count = len(positions)
    byte_counts = torch.from_numpy(bytes_per_token)
    sums = SourceSums(len(data.sequences_per_source))
    for start in range(0, count, micro * mesh.data_world_size):
        inject_fault("validate")
        if is_interrupted():
            return None
        # Ranks without a sequence of their own take part with a copy, whose loss is masked.
        rows = [start + mesh.data_rank + i * mesh.data_world_size for i in range(micro)]
        batch = run_on_all(None, data.get, [positions[min(row, count - 1)] for row in rows])
        batch = sequence_slice(batch, mesh.sequence_rank, mesh.sequence_parallel)
        is_scored = torch.tensor([row < count for row in rows])
        if saturation is not None:
            saturation.rows = is_scored
        batch = batch._replace(targets=batch.targets.masked_fill(~is_scored[:, None], -100))
        text = byte_counts[batch.targets.clamp(min=0)].masked_fill(batch.targets < 0, 0).sum(1)
        sums.add(batch, engine.evaluate(batch.to(mesh.device)).rows, text)
    return sums.all_reduce(mesh)
