"""What reaches the learned functions: validation sequences run through the model, read by hooks on its experts.

Shapes:
    N: rows that a network reads.
    E: experts of a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kabrn_dist.analysis.networks import Network, list_networks
from kabrn_dist.data.dataset import Batch
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.activation_quant import Quantized


class Reach(NamedTuple):
    """How far the inputs of a network's functions reach.

    Attributes:
        tokens_per_expert: [E] rows of each expert.
        outside: "inner" and "outer" → [E] fraction of the values outside the range of the functions before and after
            the hidden layer; NaN for an expert without rows; empty for a type without functions.
        quantile: 99.9 % of the inner functions' inputs are smaller in size; NaN without rows.
    """

    tokens_per_expert: Tensor
    outside: dict[str, Tensor]
    quantile: float


@torch.no_grad()
def measure_reach(model: MixKABRN, batch: Batch) -> list[Reach]:
    """Return one `Reach` per network, in the order of `list_networks`, from one forward pass of the model.

    The model must be whole, in this process, and as quantized as it is to be measured.
    """
    networks = list_networks(model)
    reaches: dict[int, Reach] = {}

    def measure(number: int, x: Quantized, tokens_per_expert: Sequence[int]) -> None:
        reaches[number] = _measure_network(networks[number], x, tokens_per_expert)

    with watch_inputs(networks, measure):
        model(batch)
    return [reaches[number] for number in range(len(networks))]


@contextmanager
def watch_inputs(networks: list[Network], visit: Callable[[int, Quantized, Sequence[int]], None]) -> Iterator[None]:
    """Within it, call `visit` with a network's number and its experts' inputs before each of their forward passes."""

    def hook(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: visit(number, *inputs)

    handles = [n.experts.register_forward_pre_hook(hook(number)) for number, n in enumerate(networks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measure_network(network: Network, x: Quantized, tokens_per_expert: Sequence[int]) -> Reach:
    rows = torch.tensor(tokens_per_expert)
    outside = network.experts.outside(x, tokens_per_expert)
    sizes = (x.codes / x.scale).abs().flatten().float()
    rank = max(1, round(0.999 * len(sizes)))
    quantile = float(sizes.kthvalue(rank).values) if len(sizes) else float("nan")
    return Reach(rows, {role: v.masked_fill(rows == 0, float("nan")) for role, v in outside.items()}, quantile)
