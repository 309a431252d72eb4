"""What one step reads, and what all ranks read together."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kabrn_dist.backend.losses import Totals
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import Batch, Batches, sequence_slice
from kabrn_dist.distributed.collectives import together
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.utils.errors import UserError


def read_step(config: Config, mesh: Mesh, data: Batches, first: int) -> tuple[list[Batch], Totals]:
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
    targets, failures = mesh.sum(counts.to(mesh.device)).tolist()
    if failures:
        together(None, _raise, failure)
    sequences = config.training.batch
    return batches, Totals(targets, sequences * config.data.sequence_length, sequences, mesh.world)


def _micro_batches(config: Config, mesh: Mesh, data: Batches, first: int) -> Iterator[Batch]:
    """Sequence p of the step belongs to data rank p mod their number."""
    training = config.training
    own = range(first + mesh.data_rank, first + training.batch, mesh.data_world)
    for start in range(0, len(own), training.micro_batch):
        rows = data.rows(own[start : start + training.micro_batch])
        yield sequence_slice(rows, mesh.sequence_rank, mesh.sequence)


def _raise(failure: UserError | None) -> None:
    if failure is not None:
        raise failure
