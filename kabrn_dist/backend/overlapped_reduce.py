"""Reduce-scatter of the gradients of sharded ternary matrices, overlapped with backward.

Products read a shard through an anchor that is made before the model's forward pass. Autograd runs in reverse order
of creation, so the anchor's backward comes last: a gradient's reduce-scatter starts as soon as the gradient is known,
and is waited for when everything else is done.

Shapes: G ranks that share the matrix, S latents of a rank's shard, padding included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.distributed.reduce_scatter import start_reduce_scatter
from kabrn_dist.ops.weight_quant import grad_placeholder

# Largest number of pending exchanges. Each holds the gradient of a whole matrix twice.
MAX_PENDING = 4


class GradReduceScatter:
    """Gradient exchange of one sharded matrix.

    Args:
        shape: shape of the whole matrix.
        shards: G, S.
        group: the ranks that share the matrix; None for one rank.
        dtype: dtype of the gradient in the exchange.
        pending: exchanges that have been started, of all matrices, oldest first.

    Attributes:
        last: True if the next gradient completes a step. Only then is it exchanged, with those accumulated before.
        anchor: tensor of one element through which the gradient reaches the shard; None before the first forward.
        accumulated: gradients of earlier micro-batches of the step, not exchanged yet.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        shards: tuple[int, int],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        pending: list[GradReduceScatter],
    ) -> None:
        self.shape, self.shards, self.group, self.dtype = shape, shards, group, dtype
        self.pending = pending
        self.last = True
        self.anchor: Tensor | None = None
        self.accumulated: Tensor | None = None
        self._wait: Callable[[], Tensor] | None = None
        self._sum: Tensor | None = None

    def make_anchor(self, shard: nn.Parameter, last: bool) -> None:
        """Prepare a forward pass in which the matrix is read at most once.

        Args:
            shard: [S] fp32, this rank's latents.
            last: True if the pass is the last of a step.
        """
        self.last = last
        self.anchor = _AnchorToShard.apply(shard, self)

    def placeholder(self) -> Tensor:
        """Return a zero-stride tensor of the full shape; its gradient is reduce-scattered to the shards."""
        placeholder: Tensor = _PlaceholderToAnchor.apply(self.anchor, self)
        return placeholder

    def start(self, gradient: Tensor) -> bool:
        """Start the exchange of this rank's gradient of the whole matrix.

        Returns:
            False if the gradient is only accumulated, because further micro-batches follow.
        """
        if self.accumulated is not None:
            gradient = gradient + self.accumulated
        self.accumulated = None if self.last else gradient
        if not self.last:
            return False
        ranks, size = self.shards
        padded = nn.functional.pad(gradient.reshape(-1), (0, ranks * size - gradient.numel())).view(ranks, size)
        if self.group is None:
            self._sum = padded[0].float()
            return True
        self._wait = start_reduce_scatter(padded, self.group)
        self.pending.append(self)
        if len(self.pending) > MAX_PENDING:
            self.pending[0]._finish()
        return True

    def _finish(self) -> None:
        if self._wait is not None:
            self._sum, self._wait = self._wait().float(), None
            self.pending.remove(self)

    def wait(self) -> Tensor:
        """Return the gradient [S] fp32 of this rank's shard, summed over ranks."""
        self._finish()
        total, self._sum = self._sum, None
        assert total is not None
        return total


class _AnchorToShard(torch.autograd.Function):
    """Forward: shard → anchor of one element. Backward: wait for the shard's gradient."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, reducer: GradReduceScatter) -> Tensor:
        ctx.reducer = reducer
        ctx.set_materialize_grads(False)
        return shard.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, anchor_grad: Tensor | None) -> tuple[Tensor | None, None]:
        return None if anchor_grad is None else ctx.reducer.wait(), None


class _PlaceholderToAnchor(torch.autograd.Function):
    """Forward: anchor → placeholder of the full shape. Backward: start the exchange of its gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, reducer: GradReduceScatter) -> Tensor:
        ctx.reducer = reducer
        return grad_placeholder(anchor.to(reducer.dtype), reducer.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return gradient.new_zeros(1, dtype=torch.float32) if ctx.reducer.start(gradient) else None, None
