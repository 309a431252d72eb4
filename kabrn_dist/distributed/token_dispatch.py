"""Tokens to their experts and back: dropless, with exact split sizes, overlapped with the caller's work.

1. Plan: sort the N·k pairs of a token and an expert by expert; ranks tell each other how many rows will come.
2. Dispatch: send each token once to every rank with an expert of its choice, with a bit mask of these experts.
3. Permute: copy each received row once for every expert in its mask, sorted by expert.
4. Apply: the experts compute a result for each of these rows.
5. Combine: send every result back to the rank of its token.
6. Sum: weight the k results of a token and add them, always in the order in which the router chose the experts.

    the tokens' rank                                  the experts' ranks

    x [N,D] ──1, 2─▶ rows [S,D] ═══ all-to-all ═══▶ rows ──3─▶ [R,D] ─┐
                     meanwhile: shared experts                        4
    out [N,D] ◀─6── results [M,D] ◀═ all-to-all ════════════ [R,D] ◀──┘
                     meanwhile: router statistics

What the caller computes between a start and its wait overlaps with the exchange, and its backward with the exchange of
the gradients: the backward of a wait starts that exchange, and the backward of a start waits for it. Autograd runs in
reverse creation order, so work created between start and wait also runs between them in backward, in the same order on
all ranks. Step 6 makes the sums those of a single process, bit by bit.

Shapes: N tokens of this rank, k experts a token visits, D width, M ≤ N·k routed tokens (pairs of a token and an expert
that are not dropped), S rows sent (one for each token and rank), R routed tokens that this rank's experts receive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kabrn_dist.distributed.all_to_all import ExpertLink, start_all_to_all
from kabrn_dist.distributed.stochastic_rounding import round_rows
from kabrn_dist.distributed.token_permutation import (
    DispatchPlan,
    RemotePlan,
    Segments,
    expand_by_expert,
    expert_mask_bytes,
    plan_dispatch,
)

# codes [N,D] in the compute dtype, scale [N,1] fp32 (or fp64), codes as int8 [N,D] or None: a `Quantized`.
QuantizedRows = tuple[Tensor, Tensor, Tensor | None]


def dispatch_tokens(x: QuantizedRows, expert_ids: Tensor, link: ExpertLink) -> TokenExchange:
    """Start to send tokens to their experts (steps 1 and 2), and return at once.

    Collective. Differentiable in the codes.

    Args:
        x: codes [N,D]; scale [N,1], ones where nothing is quantized, without a gradient; and the codes as int8, which
            travel in their place where `link.int8` is set.
        expert_ids: [N,k] int64 global expert numbers, different ones for each token; `link.placement.total` marks a
            routed token that is dropped.
        link: how rows travel.

    Returns:
        The exchange, whose `apply` and then `combine` are each to be called once.
    """
    return TokenExchange(x, plan_dispatch(expert_ids, link), link)


class TokenExchange:
    """The exchange of one layer's tokens: what is computed between two calls overlaps with the rows' travel."""

    def __init__(self, x: QuantizedRows, plan: DispatchPlan, link: ExpertLink) -> None:
        self.plan, self.link = plan, link
        self._dispatch = Dispatch(x, plan, link)
        self._combine: Combine | None = None

    def apply(self, experts: Callable[[QuantizedRows, list[int]], Tensor]) -> None:
        """Wait for the rows, apply this rank's experts and start to send the results back (steps 3 to 5).

        Collective.

        Args:
            experts: called once with rows (codes [R,D], scale [R,1], int8 codes [R,D] or None), sorted by expert, and
                with the number of rows of each expert; returns results [R,D].
        """
        results = experts(self._dispatch.wait(), self.plan.tokens_per_expert)
        self._combine = Combine(results, self.plan, self.link)

    def combine(self, weights: Tensor) -> Tensor:
        """Wait for the results and add them, weighted, for each token (step 6).

        Args:
            weights: [N,k] of the chosen experts; that of a dropped routed token is ignored. Differentiable.

        Returns:
            [N,D] in the dtype of the results.
        """
        assert self._combine is not None, "apply comes first"
        return self._combine.wait(weights)


class AsyncExchange(ABC):
    """An exchange of rows, and later of their gradients, as two nodes of the autograd graph: start and wait."""

    def __init__(self, values: Tensor, plan: DispatchPlan, link: ExpertLink) -> None:
        self.plan, self.link = plan, link
        self._pending: Callable[[], Tensor] | None = None
        # An empty tensor that ties the two nodes together; without other ranks the values themselves.
        self._anchor: Tensor | None = values if plan.remote is None else _Start.apply(values, self)

    @property
    def remote(self) -> RemotePlan:
        """The plan of what leaves this rank."""
        assert self.plan.remote is not None
        return self.plan.remote

    def take_anchor(self) -> Tensor:
        """Return the anchor, once. Clearing the reference breaks a cycle between the autograd graph and this object."""
        assert self._anchor is not None, "an exchange is waited for once"
        anchor, self._anchor = self._anchor, None
        return anchor

    def take_result(self) -> Tensor:
        """Wait for the rows of the exchange that was started last, and release them."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        return pending()

    @abstractmethod
    def start_forward(self, values: Tensor) -> None:
        """Start to send values."""

    @abstractmethod
    def wait_forward(self) -> Tensor:
        """Wait for the values that other ranks sent."""

    @abstractmethod
    def start_backward(self, grad: Tensor) -> None:
        """Start to send gradients of what `wait_forward` returned."""

    @abstractmethod
    def wait_backward(self) -> Tensor:
        """Wait for the gradients of what `start_forward` sent."""


class Dispatch(AsyncExchange):
    """Rows that travel to their experts."""

    def __init__(self, x: QuantizedRows, plan: DispatchPlan, link: ExpertLink) -> None:
        codes, self.scale, self.int8_codes = x
        self.width, self.dtype = codes.shape[1], codes.dtype
        self.as_int8 = link.int8 and self.int8_codes is not None
        self.wire_dtype = torch.int8 if self.as_int8 else self.dtype
        self.by_row: Segments | None = None
        super().__init__(codes, plan, link)

    def wait(self) -> QuantizedRows:
        """Wait for codes [R,D], scale [R,1] and, where they came as int8, these codes too [R,D]; sorted by expert."""
        if self.plan.remote is not None:
            codes = _Wait.apply(self.take_anchor(), self)
            return codes, self.scale, self.int8_codes
        tokens = self.plan.tokens
        self.link.traffic.routed_tokens += len(tokens)
        int8_codes = None if self.int8_codes is None else self.int8_codes.index_select(0, tokens)
        return _CopyRows.apply(self.take_anchor(), self.plan), self.scale.index_select(0, tokens), int8_codes

    def start_forward(self, values: Tensor) -> None:
        """Send one message to each rank: codes, scale and expert mask of each row."""
        remote, traffic = self.remote, self.link.traffic
        sent = self.int8_codes if self.as_int8 and self.int8_codes is not None else values
        codes = sent.index_select(0, remote.sent_tokens).view(torch.uint8)
        scale = self.scale.index_select(0, remote.sent_tokens).view(torch.uint8)
        # Codes are read in place where rows begin at multiples of their size.
        padding = -(scale.shape[1] + remote.expert_mask.shape[1]) % self.wire_dtype.itemsize
        rows = torch.cat([codes, scale, remote.expert_mask, remote.expert_mask.new_zeros(len(codes), padding)], 1)
        before = traffic.bytes_sent
        self._pending = start_all_to_all(rows, remote.sent_splits, False, self.link)
        traffic.dispatch_bytes += traffic.bytes_sent - before

    def wait_forward(self) -> Tensor:
        """Return codes [R,D] and keep their scale and int8 form (step 3)."""
        rows, placement = self.take_result(), self.link.placement
        sizes = [self.width * self.wire_dtype.itemsize, self.scale.element_size(), expert_mask_bytes(placement)]
        codes, scale, expert_mask, _ = rows.split([*sizes, rows.shape[1] - sum(sizes)], 1)
        row_ids, self.by_row = expand_by_expert(expert_mask, len(placement.local))
        self.link.traffic.routed_tokens += len(row_ids)
        self.scale = scale.index_select(0, row_ids).view(self.scale.dtype)
        received = codes.view(self.wire_dtype).index_select(0, row_ids)
        self.int8_codes = received if self.as_int8 else None
        return received.to(self.dtype)

    def start_backward(self, grad: Tensor) -> None:
        """Sum the gradients [R,D] of each received row and send one row back."""
        assert self.by_row is not None
        rows = self.by_row.sum(grad.contiguous())
        if self.link.backward_int8:
            codes, step = round_rows(rows)
            rows = torch.cat([codes.view(torch.uint8), step.view(torch.uint8)], 1)
        self._pending = start_all_to_all(rows, self.remote.sent_splits, True, self.link)

    def wait_backward(self) -> Tensor:
        """Sum the gradients of each token's rows: [N,D]."""
        rows = self.take_result()
        if self.link.backward_int8:
            step_dtype = torch.promote_types(self.dtype, torch.float32)
            step = rows[:, self.width :].contiguous().view(step_dtype)
            rows = rows[:, : self.width].view(torch.int8).to(step_dtype).mul_(step)
        return self.remote.by_token.sum(rows).to(self.dtype)


class Combine(AsyncExchange):
    """Results [R,D], sorted by expert, that travel back to the ranks of their tokens."""

    def wait(self, weights: Tensor) -> Tensor:
        """Wait for the results [M,D] and sum them with weights [N,k] for each token: [N,D] in their dtype (step 6)."""
        results = self.take_anchor() if self.plan.remote is None else _Wait.apply(self.take_anchor(), self)
        weights, plan = weights.to(results.dtype).flatten(), self.plan
        by_token = weights if plan.undropped is None else weights.index_select(0, plan.undropped)
        # Differentiable in the weights alone.
        sums = plan.by_token.sum(results, by_token)
        return _AttachRows.apply(sums, results, weights.detach().index_select(0, plan.order), plan.tokens)

    def start_forward(self, values: Tensor) -> None:
        """Send results [R,D], sorted by expert."""
        rows = values.index_select(0, self.remote.to_source_order)
        self._pending = start_all_to_all(rows, self.remote.routed_splits, True, self.link)

    def wait_forward(self) -> Tensor:
        """Return results [M,D] of this rank's tokens, sorted by expert."""
        return self.take_result()

    def start_backward(self, grad: Tensor) -> None:
        """Send gradients of [M,D] results to the experts."""
        self._pending = start_all_to_all(grad, self.remote.routed_splits, False, self.link)

    def wait_backward(self) -> Tensor:
        """Return gradients [R,D], sorted by expert."""
        return self.take_result().index_select(0, self.remote.to_expert_order)


class _Start(torch.autograd.Function):
    """Values → anchor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, exchange: AsyncExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start_forward(values)
        return values.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait_backward(), None


class _Wait(torch.autograd.Function):
    """Anchor → the values that other ranks sent."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, exchange: AsyncExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait_forward()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start_backward(grad)
        return grad.new_empty(0), None


class _CopyRows(torch.autograd.Function):
    """Copy each token for its experts. Backward sums the gradients of a token's copies in a fixed order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.by_token = plan.by_token
        return values.index_select(0, plan.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.by_token.sum(grad.contiguous()), None


class _AttachRows(torch.autograd.Function):
    """Give the rows of a weighted sum their gradient by a gather; that of `embedding_bag` would be a scatter."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, rows: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(weights, tokens)
        return sums.view_as(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weights, tokens = ctx.saved_tensors
        one_each = Segments(tokens, torch.arange(len(tokens), device=tokens.device))
        return grad, one_each.sum(grad.contiguous(), weights), None, None
