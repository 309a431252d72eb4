"""From sums over batches to losses: means over the *global* step, however its tokens are spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kabrn_dist.config import RouterConfig
from kabrn_dist.model.mixkabrn import BatchStats


@dataclass(frozen=True)
class StepTotals:
    """What one optimizer step holds over all ranks and micro-batches.

    Attributes:
        targets: tokens that carry loss, which may be none; tokens: all tokens; sequences: rows.
        ranks: DeepSpeed divides gradients by this; each rank's share of a loss is multiplied by it.
    """

    valid_tokens: int
    tokens: int
    sequences: int
    ranks: int


class Losses(NamedTuple):
    """Scalars. The mean over ranks of the sum over micro-batches is the step's loss.

    Attributes:
        total: what is differentiated.
        language: nats per target.
        balance: mean over mixtures and sequences, unweighted; 1 is a perfect balance of softmax scores.
        global_balance: mean over mixtures and tokens, unweighted; the same against the last step's loads.
        router_z: mean over mixtures and tokens of logsumexp², unweighted.
    """

    total: Tensor
    language: Tensor
    balance: Tensor
    global_balance: Tensor
    router_z: Tensor


def compute_losses(sums: BatchStats, totals: StepTotals, settings: RouterConfig) -> Losses:
    """One rank's share of a step's losses, from its micro-batch's sums."""
    layers = max(1, len(sums.tokens_per_expert))
    # A step of nothing but masked targets has a language loss of 0.
    language = sums.language * (totals.ranks / max(1, totals.valid_tokens))
    balance = sums.balance * (totals.ranks / (totals.sequences * layers))
    per_token = totals.ranks / (totals.tokens * layers)
    global_balance, router_z = sums.global_balance * per_token, sums.z * per_token
    total = (
        language
        + settings.seq_aux_loss_weight * balance
        + settings.global_aux_loss_weight * global_balance
        + settings.z_loss_weight * router_z
    )
    return Losses(total, language, balance, global_balance, router_z)
