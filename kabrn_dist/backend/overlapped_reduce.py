"""How the gradient of a shared-out matrix comes to the ranks that own its pieces, while backward goes on.

Products read a piece through a ticket that is drawn before the model's forward pass. What is first in forward is last
in backward: so a gradient sets out as soon as it is known, and is waited for when all else is done.

Shapes: G ranks that share the matrix, S latents of a rank's piece, padding included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.distributed.reduce_scatter import start_reduce_scatter
from kabrn_dist.ops.weight_quant import grad_placeholder

# Exchanges under way at a time. Each holds the gradient of a whole matrix twice.
MOST = 4


class GradReduceScatter:
    """The gradient of one shared-out matrix.

    Args:
        shape: of the whole matrix.
        pieces: G, S.
        group: the ranks that share it; None for one rank.
        dtype: of the gradient as it travels.
        under_way: exchanges that have set out, of all matrices, oldest first.

    Attributes:
        last: whether the next gradient completes a step. Only then it sets out, with those kept before.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        pieces: tuple[int, int],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        under_way: list[GradReduceScatter],
    ) -> None:
        self.shape, self.pieces, self.group, self.dtype = shape, pieces, group, dtype
        self.under_way = under_way
        self.last = True
        self.ticket: Tensor | None = None
        self.kept: Tensor | None = None
        self.finish: Callable[[], Tensor] | None = None
        self.sum: Tensor | None = None

    def draw_ticket(self, piece: nn.Parameter, last: bool) -> None:
        """Before a forward pass in which `piece` [S] fp32 is read, once at most."""
        self.last = last
        self.ticket = _Arrive.apply(piece, self)

    def whole(self) -> Tensor:
        """A place, of the whole's shape and without memory, from which a gradient finds its way to the piece."""
        found: Tensor = _Depart.apply(self.ticket, self)
        return found

    def depart(self, gradient: Tensor) -> bool:
        """Take in this rank's gradient of the whole; False if it waits for those of further micro-batches."""
        if self.kept is not None:
            gradient = gradient + self.kept
        self.kept = None if self.last else gradient
        if not self.last:
            return False
        ranks, size = self.pieces
        padded = nn.functional.pad(gradient.reshape(-1), (0, ranks * size - gradient.numel())).view(ranks, size)
        if self.group is None:
            self.sum = padded[0].float()
            return True
        self.finish = start_reduce_scatter(padded, self.group)
        self.under_way.append(self)
        if len(self.under_way) > MOST:
            self.under_way[0].land()
        return True

    def land(self) -> None:
        """Wait for the sum, if it has not come yet."""
        if self.finish is not None:
            self.sum, self.finish = self.finish().float(), None
            self.under_way.remove(self)

    def arrive(self) -> Tensor:
        """The sum over ranks [S] fp32 of this rank's piece."""
        self.land()
        found, self.sum = self.sum, None
        assert found is not None
        return found


class _Arrive(torch.autograd.Function):
    """Piece → ticket, of one element."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, homing: GradReduceScatter) -> Tensor:
        ctx.homing = homing
        ctx.set_materialize_grads(False)
        return piece.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, departed: Tensor | None) -> tuple[Tensor | None, None]:
        return None if departed is None else ctx.homing.arrive(), None


class _Depart(torch.autograd.Function):
    """Ticket → whole."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, homing: GradReduceScatter) -> Tensor:
        ctx.homing = homing
        return grad_placeholder(ticket.to(homing.dtype), homing.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return gradient.new_zeros(1, dtype=torch.float32) if ctx.homing.depart(gradient) else None, None
