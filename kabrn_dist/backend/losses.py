"""Losses of a step: means over its tokens on all ranks and in all micro-batches, from sums over batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kabrn_dist.config import RouterConfig
from kabrn_dist.model.mixkabrn import BatchStats


@dataclass(frozen=True)
class StepTotals:
    """Totals of one optimizer step over all ranks and micro-batches.

    Attributes:
        valid_tokens: tokens that carry loss; may be 0.
        tokens: all tokens.
        sequences: rows.
        ranks: number of ranks. DeepSpeed divides gradients by it, so each rank's part of a loss is multiplied by it.
    """

    valid_tokens: int
    tokens: int
    sequences: int
    ranks: int


class Losses(NamedTuple):
    """Scalars of a micro-batch. The mean over ranks of the sum over micro-batches is the step's loss.

    Attributes:
        total: weighted sum of all losses, which is differentiated.
        language: nats per target.
        balance: mean over mixtures and sequences, unweighted; 1 is a perfect balance of softmax scores.
        global_balance: mean over mixtures and tokens, unweighted; balance relative to the last step's loads.
        router_z: mean over mixtures and tokens of logsumexp², unweighted.
    """

    total: Tensor
    language: Tensor
    balance: Tensor
    global_balance: Tensor
    router_z: Tensor


def compute_losses(sums: BatchStats, totals: StepTotals, config: RouterConfig) -> Losses:
    """Return a rank's part of a step's losses.

    Args:
        sums: statistics of one micro-batch.
        totals: totals of the step.
        config: the `router` section, with the weights of the losses.
    """
    layers = max(1, len(sums.tokens_per_expert))
    # A step of nothing but masked targets has a language loss of 0.
    language = sums.language * (totals.ranks / max(1, totals.valid_tokens))
    balance = sums.balance * (totals.ranks / (totals.sequences * layers))
    per_token = totals.ranks / (totals.tokens * layers)
    global_balance, router_z = sums.global_balance * per_token, sums.z * per_token
    total = (
        language
        + config.seq_aux_loss_weight * balance
        + config.global_aux_loss_weight * global_balance
        + config.z_loss_weight * router_z
    )
    return Losses(total, language, balance, global_balance, router_z)
