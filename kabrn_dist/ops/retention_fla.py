"""Retention by flash-linear-attention's Triton kernels, on GPUs that can run them.

Chosen once a process, by agreement with the torch form on a small packed example; anything else keeps the torch form.

Shapes: B batch, H heads, T time, K key width of a head, V value width of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kabrn_dist.ops.retention_chunkwise import retention_torch

logger = logging.getLogger(__name__)

# Kernels in bf16 and fp16 round scores and states that the torch form keeps or rounds elsewhere.
TOLERANCE = 2e-2


def retention_fla(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, documents: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `retention_chunk` by fla's `chunk_simple_gla`, of which retention is a special case.

    Documents become sequences of their own, packed in one row. fla's `chunk_retention` is the same kernel with decays
    of one fixed schedule, rounded in fp32 so that slow heads share one.
    """
    batch, heads, time, _ = q.shape
    rows = [x.transpose(1, 2).reshape(1, batch * time, heads, -1) for x in (q, k, v)]
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    bounds = starts.flatten().nonzero().flatten()
    first = (starts.flatten().cumsum(0).view(batch, time) - 1)[:, 0]
    last = torch.cat([first[1:], first.new_tensor([len(bounds)])]) - 1
    initial = state.new_zeros(len(bounds), *state.shape[1:]).index_copy(0, first, state)
    lengths = torch.cat([bounds, bounds.new_tensor([batch * time])])
    out, final = kernel(
        *rows, g_gamma=log_decay, scale=1.0, initial_state=initial, output_final_state=True, cu_seqlens=lengths
    )
    return out.view(batch, time, heads, -1).transpose(1, 2), final.index_select(0, last)


@cache
def find_kernel() -> Callable[..., Any] | None:
    """Return fla's kernel if it is installed, the GPU can run Triton, and it agrees with the torch form; else None."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (7, 0):
        return None
    try:
        from fla.ops.simple_gla import chunk_simple_gla

        difference = _disagreement(chunk_simple_gla)
    except Exception as error:
        logger.warning("retention: using the torch form, because fla's kernels cannot be used: %s", error)
        return None
    if not difference <= TOLERANCE:
        logger.warning("retention: using the torch form, because fla's kernel differs from it by %.1e", difference)
        return None
    logger.info("retention: using fla's kernel, which differs from the torch form by %.1e", difference)
    return chunk_simple_gla


def _disagreement(kernel: Callable[..., Any]) -> float:
    """Largest difference of results and gradients, relative to the torch form's largest, on packed documents."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, 150, 64), (2, 2, 150, 64), (2, 2, 150, 128), (2, 2, 64, 128))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    documents = torch.tensor([[0] * 100 + [1] * 50, [0] * 150]).cuda()
    log_decay = torch.tensor([-0.1, -0.002]).cuda()
    results: list[list[Tensor]] = []
    for form in (lambda *x: retention_fla(kernel, *x), retention_torch):
        q, k, v = (x.cuda().bfloat16().requires_grad_() for x in values[:3])
        state = values[3].cuda().requires_grad_()
        out, after = form(q, k, v, log_decay, documents, state)
        (out.float().square().sum() + after.square().sum()).backward()
        results.append([out, after, *(x.grad for x in (q, k, v, state) if x.grad is not None)])
    pairs = zip(*results, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
