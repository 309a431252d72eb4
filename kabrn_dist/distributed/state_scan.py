"""Retention's states between the ranks that hold slices of one sequence.

A slice turns the state before it into the state after it: S_out = X + A·S_in, with X what its own tokens leave behind
and A the decay over its length (0 where a document starts inside). Such maps compose, so the state before each slice
is an exclusive scan over the ranks: the algebra of docs/math.md. Backward is the same scan from the last rank to the
first. What travels is one state a head, whatever the length of the slices.

Shapes: B batch, H heads, K key width, V value width of a head, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

ExchangeMethod = Literal["scan", "ring", "allgather"]
Exchange = Literal["auto", "scan", "ring", "allgather"]

# Rough costs of a link between machines, to choose an exchange by; a choice never changes results.
_SECONDS_PER_HOP = 50e-6
_BYTES_PER_SECOND = 1e9
_LOCAL_FLOPS = 1e11


class SequenceLink:
    """This rank's place among the slices of its sequences, and the exchange between them.

    Heads whose state has decayed below the rounding of its dtype after one slice (γ^L ≤ ε/2, 2⁻²⁴ in fp32) need their
    direct predecessor only: their states move one rank on, whatever the exchange.

    Sent by a rank at most, in states of H·(K·V+1) values: ring 1, allgather P−1, scan ⌈log₂P⌉; 1 for near heads.

    Args:
        group: the ranks, in the order of their slices; all slices have the same length.
        degree: how many slices there are.
        log_decays: log γ of each head.
        exchange: how far heads travel; "auto" chooses by P, the state's size and the slice's length.

    Raises:
        ValueError: where the group does not have `degree` ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        degree: int,
        log_decays: Sequence[float],
        exchange: Exchange = "auto",
    ) -> None:
        if dist.get_world_size(group) != degree:
            raise ValueError(f"group: it has {dist.get_world_size(group)} ranks for {degree} slices")
        self.group, self.degree, self.log_decays, self.exchange = group, degree, tuple(log_decays), exchange
        self.rank = dist.get_rank(group)
        self._ranks = dist.get_process_group_ranks(group)
        self._background = ThreadPoolExecutor(1)

    def start(self, state: Tensor, kept: Tensor, length: int, reverse: bool = False) -> Callable[[], Tensor]:
        """Start the exchange beside the caller's work. Collective, in the same order on all ranks.

        Args:
            state: [B,H,K,V] X, what this slice adds (in backward: the gradient it sends back).
            kept: [B,H] A.
            length: tokens of a slice.
            reverse: from the last rank to the first.

        Returns:
            A function that waits and gives the state before this slice [B,H,K,V] (in backward: the gradient of the
            state after it); zeros on the first rank (in backward: the last).
        """
        near = short_memory_heads(self.log_decays, length, state.dtype)
        far = [head for head in range(len(self.log_decays)) if head not in near]
        packed = torch.cat([state.flatten(2), kept[:, :, None]], -1)
        chosen = self._choose(packed[:, far], length)

        def run() -> Tensor:
            came = torch.zeros_like(packed)
            if near:
                came[:, near] = self._shift(packed[:, near], reverse)
            if far:
                came[:, far] = getattr(self, f"_{chosen}")(packed[:, far], reverse)
            return came[..., :-1].reshape(state.shape)

        return self._beside(run, packed.device)

    def _choose(self, packed: Tensor, length: int) -> ExchangeMethod:
        if self.exchange != "auto":
            return self.exchange
        return choose_exchange(self.degree, packed.nelement() * packed.element_size(), length)

    def _beside(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        if device.type != "cuda":
            return self._background.submit(run).result
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            came = run()

        def wait() -> Tensor:
            torch.cuda.current_stream(device).wait_stream(side)
            came.record_stream(torch.cuda.current_stream(device))
            return came

        return wait

    def _place(self, reverse: bool) -> int:
        return self.degree - 1 - self.rank if reverse else self.rank

    def _peer(self, place: int, reverse: bool) -> int:
        return self._ranks[self.degree - 1 - place if reverse else place]

    def _trade(self, to: int | None, value: Tensor | None, source: int | None, like: Tensor) -> Tensor:
        """Send `value` to one global rank and receive from another, either of which may be missing."""
        came = torch.zeros_like(like)
        sends = [] if to is None or value is None else [dist.P2POp(dist.isend, value, to, self.group)]
        receives = [] if source is None else [dist.P2POp(dist.irecv, came, source, self.group)]
        for work in dist.batch_isend_irecv(sends + receives) if sends + receives else ():
            work.wait()
        return came

    def _neighbors(self, reverse: bool) -> tuple[int | None, int | None]:
        place = self._place(reverse)
        after = self._peer(place + 1, reverse) if place + 1 < self.degree else None
        before = self._peer(place - 1, reverse) if place > 0 else None
        return after, before

    def _shift(self, packed: Tensor, reverse: bool) -> Tensor:
        after, before = self._neighbors(reverse)
        return self._trade(after, packed.contiguous(), before, packed)

    def _ring(self, packed: Tensor, reverse: bool) -> Tensor:
        after, before = self._neighbors(reverse)
        came = self._trade(None, None, before, packed)
        self._trade(after, compose(came, packed), None, packed)
        return came

    def _allgather(self, packed: Tensor, reverse: bool) -> Tensor:
        everyone = [torch.empty_like(packed, memory_format=torch.contiguous_format) for _ in range(self.degree)]
        dist.all_gather(everyone, packed.contiguous(), group=self.group)
        came = torch.zeros_like(packed)
        for place in range(self._place(reverse)):
            came = compose(came, everyone[self.degree - 1 - place if reverse else place])
        return came

    def _scan(self, packed: Tensor, reverse: bool) -> Tensor:
        """Recursive doubling: after round n a rank has composed its block of 2ⁿ, and all of the block before it."""
        place = self._place(reverse)
        block, came = packed.contiguous(), torch.zeros_like(packed)
        first = True
        for bit in range((self.degree - 1).bit_length()):
            partner = place ^ (1 << bit)
            if partner >= self.degree:
                continue
            peer = self._peer(partner, reverse)
            other = self._trade(peer, block, peer, packed)
            if partner < place:
                came = other if first else compose(other, came)
                block, first = compose(other, block), False
            else:
                block = compose(block, other)
        return came


def compose(first: Tensor, second: Tensor) -> Tensor:
    """(X₂ + A₂·X₁, A₂·A₁) of two maps packed as [..., K·V+1], A last."""
    both = first * second[..., -1:]
    both[..., :-1] += second[..., :-1]
    return both


def short_memory_heads(log_decays: Sequence[float], length: int, dtype: torch.dtype) -> list[int]:
    """Heads of which nothing is left after one slice: γ^length ≤ ε/2, half a rounding of `dtype`."""
    bound = math.log(torch.finfo(dtype).eps / 2)
    return [head for head, decay in enumerate(log_decays) if length * decay <= bound]


def choose_exchange(degree: int, state_bytes: int, length: int) -> ExchangeMethod:
    """The exchange that keeps a rank waiting least, and sends least among equals.

    Waiting is the time of the exchange beyond that of the slice's own products, which it runs beside.

    Args:
        degree: P.
        state_bytes: of the far heads' states, all rows of the batch.
        length: tokens of a slice.
    """
    local = length * state_bytes / _LOCAL_FLOPS
    rounds = math.ceil(math.log2(max(2, degree)))
    # Hops, states that pass one after another, states that a rank sends.
    costs: dict[ExchangeMethod, tuple[int, int, int]] = {
        "ring": (degree - 1, degree - 1, 1),
        "scan": (rounds, rounds, rounds),
        "allgather": (1, degree - 1, degree - 1),
    }

    def waiting(way: ExchangeMethod) -> tuple[float, int]:
        hops, states, sent = costs[way]
        seconds = hops * _SECONDS_PER_HOP + states * state_bytes / _BYTES_PER_SECOND
        return max(0.0, seconds - local), sent

    return min(costs, key=waiting)
