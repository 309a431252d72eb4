"""Exchanges that run concurrently with the caller's work: on a CUDA stream of their own, or in a thread on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import torch
from torch import Tensor


def run_overlapped(function: Callable[..., Tensor], *inputs: Tensor, executor: Executor) -> Callable[[], Tensor]:
    """Start `function(*inputs)` and return at once.

    Every tensor that crosses streams is recorded here, so that its memory is not reused while the other stream may
    still read it: the inputs on the side stream, the result on the stream that waits.

    Args:
        function: may communicate; tensors of the caller's stream that it reads come in as arguments.
        inputs: one or more, all on one device.
        executor: one thread, which runs the function on CPUs, so that all ranks make their calls in the same order.

    Returns:
        A function that waits and returns the result.
    """
    device = inputs[0].device
    if device.type != "cuda":
        return executor.submit(function, *inputs).result
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    for tensor in inputs:
        tensor.record_stream(side)
    with torch.cuda.stream(side):
        result = function(*inputs)

    def wait() -> Tensor:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        result.record_stream(current)
        return result

    return wait
