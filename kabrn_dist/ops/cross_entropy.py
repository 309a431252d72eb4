"""Cross-entropy of logits, whose gradient takes their place: logits are held once, in the dtype that they come in.

Shapes:
    N: rows.
    C: classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.kernels.selection import kernels_for
from kabrn_dist.ops.activation_quant import to_fp32

# A target that counts for nothing, as in torch.
IGNORED = -100


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each row in nats.

    The backward pass overwrites the logits with their gradient, so nothing else may need them by then, and it can run
    only once.

    Args:
        logits: [N,C].
        targets: [N] int64, −100 where a row has none.

    Returns:
        [N] in fp32 or wider; 0 where a row has no target.

    Raises:
        ValueError: a target is no class.
    """
    if bool(((targets >= logits.shape[1]) | ((targets < 0) & (targets != IGNORED))).any()):
        raise ValueError(f"a target is not one of {logits.shape[1]} classes")
    if kernels_for(logits) is None:
        return cross_entropy_naive(logits, targets)
    nats: Tensor = _CrossEntropy.apply(logits, targets)
    return nats


def cross_entropy_naive(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute `cross_entropy` by torch's own, which holds the logits, and their gradient, once more in fp32."""
    return F.cross_entropy(to_fp32(logits), targets, reduction="none", ignore_index=IGNORED)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        kernels = kernels_for(logits)
        assert kernels is not None
        logits, targets = logits.detach().contiguous(), targets.contiguous()
        nats, log_sum = kernels.cross_entropy.forward(logits, targets)
        ctx.save_for_backward(logits, targets, log_sum)
        ctx.is_consumed = False
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.is_consumed:
            raise RuntimeError("the logits have been overwritten by their gradient; run the forward pass again")
        ctx.is_consumed = True
        logits, targets, log_sum = ctx.saved_tensors
        kernels = kernels_for(logits)
        assert kernels is not None
        return kernels.cross_entropy.backward_(logits, targets, log_sum, grad.float().contiguous()), None
