"""Tokens to their experts and back: dropless, exact split sizes, beside the caller's work.

What the caller computes between a start and its finish overlaps with the exchange, and its backward with the exchange
of the gradients: the backward of a finish starts that, and the backward of the start waits. Autograd runs what was
made last first, so it runs what was made between the two between them, and in the same order on all ranks.

Towards the experts a token travels once to each rank, with a record of the experts there that want it. Back, each copy
travels by itself, and is weighed and summed at home in the order of the token's choice: the sums are those of one
process, bit by bit.

Shapes: N tokens of this rank, k experts a token visits, M copies of them, D width, S rows that leave (one for each
token and rank), R copies that arrive here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kabrn_dist.distributed.all_to_all import ExpertLink, start_exchange
from kabrn_dist.distributed.stochastic_rounding import round_rows
from kabrn_dist.distributed.token_permutation import (
    DispatchPlan,
    RemotePlan,
    Segments,
    expert_mask_bytes,
    spread_arrivals,
)


def start_dispatch(
    codes: Tensor, scale: Tensor, route: DispatchPlan, wire: ExpertLink, kept: Tensor | None = None
) -> Dispatch:
    """Send tokens to their experts. Collective; returns at once. Differentiable in `codes`.

    Args:
        codes: [N,D] in the compute dtype.
        scale: [N,1] fp32 (or fp64), ones where nothing is quantised. It has no gradient.
        kept: [N,D] int8, the codes where they are whole numbers: with `wire.int8` these bytes travel in their place.
    """
    return Dispatch(codes, scale, kept, route, wire)


def finish_dispatch(flight: Dispatch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Wait for codes [R,D], scale [R,1] and, where they came as bytes, these too [R,D] int8.

    Sorted by local expert, `route.counts` of each.
    """
    if flight.route.remote is None:
        tokens = flight.route.tokens
        flight.wire.traffic.rows += len(tokens)
        kept = None if flight.kept is None else flight.kept.index_select(0, tokens)
        return _Spread.apply(flight.take_ticket(), flight.route), flight.scale.index_select(0, tokens), kept
    codes = _Finish.apply(flight.take_ticket(), flight)
    return codes, flight.scale, flight.kept


def start_combine(results: Tensor, weights: Tensor, route: DispatchPlan, wire: ExpertLink) -> Combine:
    """Send experts' results home. Collective; returns at once. Differentiable in `results` and `weights`.

    Args:
        results: [R,D] as they arrived, sorted by local expert.
        weights: [N,k] of the tokens of this rank; that of a dropped copy is ignored.
    """
    return Combine(results, weights, route, wire)


def finish_combine(flight: Combine) -> Tensor:
    """Wait for the results and sum them, weighed, for each token: [N,D] in their dtype."""
    ticket = flight.take_ticket()
    at_home = ticket if flight.route.remote is None else _Finish.apply(ticket, flight)
    return _weigh(at_home, flight.weights.to(at_home.dtype).flatten(), flight.route)


def _weigh(rows: Tensor, weights: Tensor, route: DispatchPlan) -> Tensor:
    """[M,D] results sorted by expert and [N·k] weights → [N,D] sums."""
    by_token = weights if route.undropped is None else weights.index_select(0, route.undropped)
    # Differentiable in the weights alone.
    sums = route.home.sum(rows, by_token)
    return _TieRows.apply(sums, rows, weights.detach().index_select(0, route.order), route.tokens)


class _AsyncExchange(ABC):
    """Rows under way, and later their gradients under way back. Holds what the two ends share."""

    def __init__(self, values: Tensor, route: DispatchPlan, wire: ExpertLink) -> None:
        self.route, self.wire = route, wire
        self.wait: Callable[[], Tensor] | None = None
        # Without journey the rows themselves; else an empty tensor that ties the two ends together in the graph.
        self.ticket: Tensor | None = values if route.remote is None else _Start.apply(values, self)

    @property
    def journey(self) -> RemotePlan:
        assert self.route.remote is not None
        return self.route.remote

    def take_ticket(self) -> Tensor:
        """Once: the graph that it belongs to holds this flight, which must not hold the graph for ever."""
        assert self.ticket is not None, "a flight is finished once"
        ticket, self.ticket = self.ticket, None
        return ticket

    def landed(self) -> Tensor:
        """Wait for what was launched last, and hold it no longer."""
        assert self.wait is not None
        wait, self.wait = self.wait, None
        return wait()

    @abstractmethod
    def launch(self, values: Tensor) -> None: ...

    @abstractmethod
    def land(self) -> Tensor: ...

    @abstractmethod
    def launch_gradient(self, grad: Tensor) -> None: ...

    @abstractmethod
    def land_gradient(self) -> Tensor: ...


class Dispatch(_AsyncExchange):
    """Codes under way to their experts."""

    def __init__(
        self, codes: Tensor, scale: Tensor, kept: Tensor | None, route: DispatchPlan, wire: ExpertLink
    ) -> None:
        self.scale, self.width, self.dtype, self.kept = scale, codes.shape[1], codes.dtype, kept
        self.int8 = wire.int8 and kept is not None
        self.sent_dtype = torch.int8 if self.int8 else self.dtype
        self.copies: Segments | None = None
        super().__init__(codes, route, wire)

    def launch(self, values: Tensor) -> None:
        """One message to each rank: values, scale and record of each row."""
        journey, traffic = self.journey, self.wire.traffic
        sent = self.kept if self.int8 and self.kept is not None else values
        codes = sent.index_select(0, journey.tokens).view(torch.uint8)
        scale = self.scale.index_select(0, journey.tokens).view(torch.uint8)
        # Values are read in place where rows begin at multiples of their size.
        padding = -(scale.shape[1] + journey.expert_mask.shape[1]) % self.sent_dtype.itemsize
        rows = torch.cat([codes, scale, journey.expert_mask, journey.expert_mask.new_zeros(len(codes), padding)], 1)
        before = traffic.bytes_sent
        self.wait = start_exchange(rows, journey.rows, False, self.wire)
        traffic.bytes_dispatch += traffic.bytes_sent - before

    def land(self) -> Tensor:
        rows, placement = self.landed(), self.wire.placement
        ends = [self.width * self.sent_dtype.itemsize, self.scale.element_size(), expert_mask_bytes(placement)]
        codes, scale, wanted, _ = rows.split([*ends, rows.shape[1] - sum(ends)], 1)
        arrival, self.copies = spread_arrivals(wanted, len(placement.local))
        self.wire.traffic.rows += len(arrival)
        self.scale = scale.index_select(0, arrival).view(self.scale.dtype)
        arrived = codes.view(self.sent_dtype).index_select(0, arrival)
        self.kept = arrived if self.int8 else None
        return arrived.to(self.dtype)

    def launch_gradient(self, grad: Tensor) -> None:
        assert self.copies is not None
        rows = self.copies.sum(grad.contiguous())
        if self.wire.backward_int8:
            codes, step = round_rows(rows)
            rows = torch.cat([codes.view(torch.uint8), step.view(torch.uint8)], 1)
        self.wait = start_exchange(rows, self.journey.rows, True, self.wire)

    def land_gradient(self) -> Tensor:
        rows = self.landed()
        if self.wire.backward_int8:
            wide = torch.promote_types(self.dtype, torch.float32)
            step = rows[:, self.width :].contiguous().view(wide)
            rows = rows[:, : self.width].view(torch.int8).to(wide).mul_(step)
        return self.journey.home.sum(rows).to(self.dtype)


class Combine(_AsyncExchange):
    """Experts' results under way home."""

    def __init__(self, results: Tensor, weights: Tensor, route: DispatchPlan, wire: ExpertLink) -> None:
        self.weights = weights
        super().__init__(results, route, wire)

    def launch(self, values: Tensor) -> None:
        self.wait = start_exchange(
            values.index_select(0, self.journey.to_source_order), self.journey.copies, True, self.wire
        )

    def land(self) -> Tensor:
        return self.landed()

    def launch_gradient(self, grad: Tensor) -> None:
        self.wait = start_exchange(grad, self.journey.copies, False, self.wire)

    def land_gradient(self) -> Tensor:
        return self.landed().index_select(0, self.journey.to_expert_order)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, flight: _AsyncExchange) -> Tensor:
        ctx.flight = flight
        flight.launch(values)
        return values.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land_gradient(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: _AsyncExchange) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.launch_gradient(grad)
        return grad.new_empty(0), None


class _Spread(torch.autograd.Function):
    """Copy each token for its experts. Backward sums a token's copies in a fixed order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, route: DispatchPlan) -> Tensor:
        ctx.home = route.home
        return values.index_select(0, route.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.home.sum(grad.contiguous()), None


class _TieRows(torch.autograd.Function):
    """Let the rows of a weighed sum have their gradient, which `embedding_bag` would scatter."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, rows: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(weights, tokens)
        return sums.view_as(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weights, tokens = ctx.saved_tensors
        one_each = Segments(tokens, torch.arange(len(tokens), device=tokens.device))
        return grad, one_each.sum(grad.contiguous(), weights), None, None
