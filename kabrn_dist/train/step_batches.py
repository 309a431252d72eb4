"""The micro-batches of one step, and the step's totals over all ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kabrn_dist.backend.losses import StepTotals
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import Batch, TokenDataset, sequence_slice
from kabrn_dist.distributed.collectives import raise_on_all
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.utils.errors import UserError


def next_step_batches(config: Config, mesh: Mesh, data: TokenDataset, first: int) -> tuple[list[Batch], StepTotals]:
    """Return this rank's micro-batches of a step, on the host, and the step's totals. Collective.

    Args:
        config: the whole configuration.
        mesh: all ranks.
        data: the training split.
        first: position of the step's first sequence.

    Raises:
        UserError: on all ranks, if one cannot read.
    """
    batches: list[Batch] = []
    failure: UserError | None = None
    try:
        batches = list(_micro_batches(config, mesh, data, first))
    except UserError as error:
        failure = error
    counts = torch.tensor([sum(int((b.targets >= 0).sum()) for b in batches), int(failure is not None)])
    valid_tokens, failures = mesh.all_reduce_sum(counts.to(mesh.device)).tolist()
    if failures:
        raise_on_all(None, failure)
    sequences = config.training.global_batch_size
    return batches, StepTotals(valid_tokens, sequences * config.data.sequence_length, sequences, mesh.world_size)


def _micro_batches(config: Config, mesh: Mesh, data: TokenDataset, first: int) -> Iterator[Batch]:
    """Sequence p of the step belongs to data rank p mod the number of data ranks."""
    training = config.training
    own = range(first + mesh.data_rank, first + training.global_batch_size, mesh.data_world_size)
    for start in range(0, len(own), training.micro_batch_size):
        rows = data.get(own[start : start + training.micro_batch_size])
        yield sequence_slice(rows, mesh.sequence_rank, mesh.sequence_parallel)
