"""What one step reads, and what all ranks read together."""

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
    """This rank's micro-batches of the step that reads from position `first` on, and the step's totals. Collective.

    Raises:
        UserError: on all ranks, where one cannot read.
    """
    batches: list[Batch] = []
    failure: UserError | None = None
    try:
        batches = list(_micro_batches(config, mesh, data, first))
    except UserError as error:
        failure = error
    counts = torch.tensor([sum(int((b.targets >= 0).sum()) for b in batches), int(failure is not None)])
    targets, failures = mesh.all_reduce_sum(counts.to(mesh.device)).tolist()
    if failures:
        raise_on_all(None, failure)
    sequences = config.training.global_batch_size
    return batches, StepTotals(targets, sequences * config.data.sequence_length, sequences, mesh.world_size)


def _micro_batches(config: Config, mesh: Mesh, data: TokenDataset, first: int) -> Iterator[Batch]:
    """Sequence p of the step belongs to data rank p mod their number."""
    training = config.training
    own = range(first + mesh.data_rank, first + training.global_batch_size, mesh.data_world_size)
    for start in range(0, len(own), training.micro_batch_size):
        rows = data.get(own[start : start + training.micro_batch_size])
        yield sequence_slice(rows, mesh.sequence_rank, mesh.sequence_parallel)
