"""Retention states between the ranks that hold slices of one sequence: an exclusive scan over the ranks.

A slice turns the state before it into the state after it: S_out = X + A·S_in, with X what its own tokens add and A
the decay over its length (0 where a document starts inside). Such maps compose, (X₂ + A₂·X₁, A₂·A₁), so the state
before each slice is an exclusive scan over the ranks. Backward is the same scan from the last rank to the first. One
state a head travels, whatever the length of the slices.

Shapes: B batch, H heads, K key width and V value width of a head, P ranks (one slice each).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.distributed.overlap import run_overlapped

ExchangeMethod = Literal["scan", "ring", "allgather"]

# Rough costs of a link between nodes, to choose a method by; the choice never changes results.
_SECONDS_PER_HOP = 50e-6
_BYTES_PER_SECOND = 1e9
_LOCAL_FLOPS = 1e11


class SequenceLink:
    """The exchange of retention states between the ranks of a sequence group.

    Heads whose state has decayed below the rounding of its dtype after one slice (γ^L ≤ ε/2, 2⁻²⁴ in fp32) need only
    their direct predecessor: their states move one rank on, whatever the method.

    A rank sends at most, in states of H·(K·V+1) values: ring 1, allgather P−1, scan ⌈log₂P⌉; 1 for such heads.

    Args:
        group: the ranks, in the order of their slices; all slices have the same length.
        degree: P.
        log_decays: log γ of each head.
        method: how states of the other heads travel; "auto" chooses by P, the state's size and the slice's length.

    Raises:
        ValueError: the group does not have `degree` ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        degree: int,
        log_decays: Sequence[float],
        method: ExchangeMethod | Literal["auto"] = "auto",
    ) -> None:
        if dist.get_world_size(group) != degree:
            raise ValueError(
                f"group has {dist.get_world_size(group)} ranks; pass one of {degree}, a rank for each slice"
            )
        self.group, self.degree, self.log_decays, self.method = group, degree, tuple(log_decays), method
        self.rank = dist.get_rank(group)
        self._ranks = dist.get_process_group_ranks(group)
        self._executor = ThreadPoolExecutor(1)

    def start(self, state: Tensor, decay: Tensor, length: int, reverse: bool = False) -> Callable[[], Tensor]:
        """Start the exchange, and return at once. Collective, in the same order on all ranks.

        Args:
            state: [B,H,K,V] X, what this slice adds (in backward: the gradient it sends back).
            decay: [B,H] A.
            length: tokens of a slice.
            reverse: from the last rank to the first.

        Returns:
            A function that waits and returns the state before this slice [B,H,K,V] (in backward: the gradient of the
            state after it); zeros on the first rank (in backward: the last).
        """
        short = short_memory_heads(self.log_decays, length, state.dtype)
        long = [head for head in range(len(self.log_decays)) if head not in short]
        packed = torch.cat([state.flatten(2), decay[:, :, None]], -1)
        method = self._choose_method(packed[:, long], length)

        def exchange(packed: Tensor) -> Tensor:
            before = torch.zeros_like(packed)
            if short:
                before[:, short] = self._shift(packed[:, short], reverse)
            if long:
                before[:, long] = getattr(self, f"_{method}")(packed[:, long], reverse)
            return before[..., :-1].reshape(state.shape)

        return run_overlapped(exchange, packed, executor=self._executor)

    def _choose_method(self, packed: Tensor, length: int) -> ExchangeMethod:
        if self.method != "auto":
            return self.method
        return choose_exchange(self.degree, packed.nelement() * packed.element_size(), length)

    def _position(self, reverse: bool) -> int:
        """This rank's position in the order of the scan."""
        return self.degree - 1 - self.rank if reverse else self.rank

    def _rank_at(self, position: int, reverse: bool) -> int:
        """The global rank at a position in the order of the scan."""
        return self._ranks[self.degree - 1 - position if reverse else position]

    def _send_receive(self, to: int | None, value: Tensor | None, source: int | None, like: Tensor) -> Tensor:
        """Send `value` to one global rank and receive from another, either of which may be missing."""
        received = torch.zeros_like(like)
        sends = [] if to is None or value is None else [dist.P2POp(dist.isend, value, to, self.group)]
        receives = [] if source is None else [dist.P2POp(dist.irecv, received, source, self.group)]
        for work in dist.batch_isend_irecv(sends + receives) if sends + receives else ():
            work.wait()
        return received

    def _neighbors(self, reverse: bool) -> tuple[int | None, int | None]:
        """The next and the previous global rank in the order of the scan."""
        position = self._position(reverse)
        after = self._rank_at(position + 1, reverse) if position + 1 < self.degree else None
        before = self._rank_at(position - 1, reverse) if position > 0 else None
        return after, before

    def _shift(self, packed: Tensor, reverse: bool) -> Tensor:
        after, before = self._neighbors(reverse)
        return self._send_receive(after, packed.contiguous(), before, packed)

    def _ring(self, packed: Tensor, reverse: bool) -> Tensor:
        after, before = self._neighbors(reverse)
        prefix = self._send_receive(None, None, before, packed)
        self._send_receive(after, compose(prefix, packed), None, packed)
        return prefix

    def _allgather(self, packed: Tensor, reverse: bool) -> Tensor:
        gathered = [torch.empty_like(packed, memory_format=torch.contiguous_format) for _ in range(self.degree)]
        dist.all_gather(gathered, packed.contiguous(), group=self.group)
        prefix = torch.zeros_like(packed)
        for position in range(self._position(reverse)):
            prefix = compose(prefix, gathered[self.degree - 1 - position if reverse else position])
        return prefix

    def _scan(self, packed: Tensor, reverse: bool) -> Tensor:
        """Recursive doubling: after round n a rank has composed its block of 2ⁿ, and all of the block before it."""
        position = self._position(reverse)
        block, prefix = packed.contiguous(), torch.zeros_like(packed)
        first = True
        for bit in range((self.degree - 1).bit_length()):
            partner = position ^ (1 << bit)
            if partner >= self.degree:
                continue
            peer = self._rank_at(partner, reverse)
            other = self._send_receive(peer, block, peer, packed)
            if partner < position:
                prefix = other if first else compose(other, prefix)
                block, first = compose(other, block), False
            else:
                block = compose(block, other)
        return prefix


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Compose two maps (X, A), packed as [..., K·V+1] with A last: (X₂ + A₂·X₁, A₂·A₁).

    Example:
        >>> compose(torch.tensor([1.0, 0.5]), torch.tensor([3.0, 0.25]))  # x ↦ 1 + x/2, then x ↦ 3 + x/4
        tensor([3.2500, 0.1250])
    """
    both = first * second[..., -1:]
    both[..., :-1] += second[..., :-1]
    return both


def short_memory_heads(log_decays: Sequence[float], length: int, dtype: torch.dtype) -> list[int]:
    """Return the heads whose state is gone after one slice: γ^length ≤ ε/2, half a rounding of `dtype`."""
    bound = math.log(torch.finfo(dtype).eps / 2)
    return [head for head, decay in enumerate(log_decays) if length * decay <= bound]


def choose_exchange(degree: int, state_bytes: int, length: int) -> ExchangeMethod:
    """Return the method that makes a rank wait least, and among equals the one that sends least.

    The exchange runs concurrently with the slice's own products; a rank waits for what takes longer than these.

    Args:
        degree: P.
        state_bytes: bytes of the states that travel, of all rows of the batch.
        length: tokens of a slice.

    Example:
        >>> choose_exchange(degree=16, state_bytes=10**3, length=16)  # small states: one hop is best
        'allgather'
    """
    local = length * state_bytes / _LOCAL_FLOPS
    rounds = math.ceil(math.log2(max(2, degree)))
    # Hops, states that pass one after another, states that a rank sends.
    costs: dict[ExchangeMethod, tuple[int, int, int]] = {
        "ring": (degree - 1, degree - 1, 1),
        "scan": (rounds, rounds, rounds),
        "allgather": (1, degree - 1, degree - 1),
    }

    def waiting(method: ExchangeMethod) -> tuple[float, int]:
        hops, states, sent = costs[method]
        seconds = hops * _SECONDS_PER_HOP + states * state_bytes / _BYTES_PER_SECOND
        return max(0.0, seconds - local), sent

    return min(costs, key=waiting)
