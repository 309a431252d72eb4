"""Samples one after another in a row, each from an empty state, and the memory that reading them takes.

Shapes:
    T: tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from kabrn_dist.data.dataset import Batch
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.online_learning.samples import Sample
from kabrn_dist.ops.cross_entropy import IGNORED, cross_entropy
from kabrn_dist.utils.errors import UserError

PROBE_TOKENS = 64
MIN_ROW_TOKENS, MAX_ROW_TOKENS = 64, 4096
# What passes allocate for a moment, as a fraction of what they keep for backward.
_TEMPORARY_SHARE = 0.5


def make_row(samples: Sequence[Sample]) -> Batch:
    """Return samples as the documents of one row, [1,T]; what follows the last token of each carries no loss.

    Args:
        samples: At least one, of at least two tokens.
    """
    tokens, targets, documents, positions = (list[int]() for _ in range(4))
    for number, sample in enumerate(samples):
        count = len(sample.ids) - 1
        tokens += sample.ids[:-1]
        targets += [id if learned else IGNORED for id, learned in zip(sample.ids[1:], sample.learned[1:], strict=True)]
        documents += [number] * count
        positions += range(count)
    parts = [torch.tensor([part], dtype=torch.int64) for part in (tokens, targets, documents, positions)]
    return Batch(parts[0], parts[1], parts[2], parts[3], torch.zeros(1, dtype=torch.int64))


def pack_rows(samples: Iterable[Sample], row_tokens: int) -> Iterator[list[Sample]]:
    """Yield samples in their order, as many together as fit into a row; one that is longer is a row of its own."""
    row: list[Sample] = []
    size = 0
    for sample in samples:
        if row and size + len(sample.ids) > row_tokens:
            yield row
            row, size = [], 0
        row.append(sample)
        size += len(sample.ids)
    if row:
        yield row


@torch.no_grad()
def mean_loss(model: MixKABRN, samples: Sequence[Sample], row_tokens: int) -> float:
    """Return the mean loss of the samples' targets in nats; 0 without any."""
    total = sum(float(model(make_row(row)).language) for row in pack_rows(samples, row_tokens))
    return total / max(1, sum(sample.targets for sample in samples))


@torch.no_grad()
def largest_loss(model: MixKABRN, sample: Sample) -> float:
    """Return the largest loss of a target of a sample in nats; 0 without any."""
    row = make_row([sample])
    hidden, _ = model.read(row.tokens, row.documents, row.positions, None)
    return float(cross_entropy(model.head(hidden[0]), row.targets[0]).max())


def measure_token_bytes(model: MixKABRN) -> float:
    """Return the bytes of memory that a token of a row takes until the backward pass, in a model that is trained."""
    vocabulary = model.config.vocab_size
    ids = torch.arange(PROBE_TOKENS + 1).remainder(vocabulary).tolist()
    row = make_row([Sample(ids, [True] * len(ids))])
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), torch.enable_grad():
        loss = model(row).language
    total = sum(size for place, size in kept.items() if place not in weights)
    del loss
    return total * (1 + _TEMPORARY_SHARE) / PROBE_TOKENS


def choose_row_tokens(token_bytes: float, memory_bytes: int) -> int:
    """Return the longest row that learning has memory for.

    Raises:
        UserError: if there is too little for any.
    """
    tokens = min(MAX_ROW_TOKENS, int(memory_bytes / token_bytes))
    if tokens < MIN_ROW_TOKENS:
        needed = MIN_ROW_TOKENS * token_bytes / 1e6
        raise UserError(f"--memory {memory_bytes / 1e6:.0f}: learning with this model needs {needed:.0f} MB or more")
    return tokens
