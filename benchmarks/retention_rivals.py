"""What retention is held against. Each is a function of no arguments: one forward and one backward pass.

- SDPA: torch's causal `scaled_dot_product_attention`. Its fast CPU and GPU kernels want one width for keys and values
  (K 64 and V 128 as they are fall back to the T×T form, another 2 to 3 times slower), so q and k get zeros up to 128,
  beforehand and not timed. At 8K two calls with half the value columns each were a tenth slower.
- torchscale: `MultiScaleRetention.chunk_recurrent_forward` and nothing around it: no projections, rotary, norm or
  gate on either side. It divides scores by running normalisers that ours does not have. No documents, no state in or
  out. Its chunk of 512 is slower (8K, fp32: 290 ms against 161): it runs at `TORCHSCALE_CHUNK`.
- The floor: only the matrix products that the chunk form needs. See `floor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.ops.retention import log_decays, retention_chunk

Function = Callable[[], object]

TORCHSCALE_CHUNK = 128


class Inputs:
    """Random q, k [B,H,T,K] and v, the gradient of the output [B,H,T,V]; B = 1. All rivals get these."""

    def __init__(
        self, time: int, dtype: torch.dtype, device: str = "cpu", heads: int = 4, key: int = 64, value: int = 128
    ) -> None:
        draw = torch.Generator(device).manual_seed(time)

        def normal(width: int) -> Tensor:
            return torch.randn(1, heads, time, width, generator=draw, device=device, dtype=dtype)

        self.heads, self.time, self.key, self.value = heads, time, key, value
        self.q, self.k, self.v, self.grad = normal(key) * key**-0.5, normal(key), normal(value), normal(value)
        self.log_decay = torch.tensor(log_decays("exponent", heads), device=device)
        self.one = torch.zeros(1, time, dtype=torch.int64, device=device)
        # About a thousand tokens each, and never in step with the chunks.
        self.packed = (torch.arange(time, device=device) // 1003)[None]

    def learns(self, x: Tensor) -> Tensor:
        """Return a copy that requires a gradient."""
        return x.detach().clone().requires_grad_()


def ours(x: Inputs, documents: Tensor, backward: bool = True) -> Function:
    """Return the chunkwise form of this project."""
    q, k, v = (x.learns(part) for part in (x.q, x.k, x.v))

    def forward() -> Tensor:
        return retention_chunk(q, k, v, x.log_decay, documents)[0]

    return (lambda: torch.autograd.grad(forward(), (q, k, v), x.grad)) if backward else forward


def sdpa(x: Inputs, backward: bool = True) -> Function:
    """Return causal softmax attention by torch."""
    q, k = (x.learns(F.pad(part, (0, x.value - x.key))) for part in (x.q, x.k))
    v = x.learns(x.v)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)

    return (lambda: torch.autograd.grad(forward(), (q, k, v), x.grad)) if backward else forward


def torchscale(x: Inputs, backward: bool = True, chunk: int = TORCHSCALE_CHUNK) -> Function | str:
    """The function, or why it cannot be had."""
    try:
        from torchscale.component.multiscale_retention import MultiScaleRetention
    except ImportError as error:
        return f"missing: {error.name} (pip install --no-deps torchscale)"
    settings = SimpleNamespace(multiway=False, layernorm_eps=1e-6)
    module = MultiScaleRetention(settings, x.heads * x.key, x.heads * x.value, x.heads)
    mask = torchscale_mask(x.log_decay, chunk, x.q.dtype)
    q, k = x.learns(x.q), x.learns(x.k)
    v = x.learns(x.v.transpose(1, 2).flatten(2))
    grad = x.grad.transpose(1, 2).reshape(1, x.time // chunk, chunk, x.heads, x.value)

    def forward() -> Tensor:
        out: Tensor = module.chunk_recurrent_forward(q, k, v, mask)
        return out

    return (lambda: torch.autograd.grad(forward(), (q, k, v), grad)) if backward else forward


def torchscale_mask(log_decay: Tensor, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What its `RetNetRelPos` prepares; that module cannot be imported without an old timm."""
    place = torch.arange(chunk)
    decay = log_decay[:, None, None]
    mask = ((place[:, None] - place).clamp(min=0) * decay).exp().tril()
    total, scale = mask[:, -1].sum(-1)[:, None, None], mask.sum(-1, keepdim=True).sqrt()
    inner, cross = mask / scale, (decay * chunk).exp()
    query = ((place[:, None] + 1) * decay).exp() / (scale / total)
    value = mask[:, -1, :, None] / total
    return inner.to(dtype), cross.to(dtype), query.to(dtype), value.to(dtype)


def floor(x: Inputs, chunk: int) -> Function:
    """The twelve batched products of one forward and backward pass, into memory already there.

    For each head and chunk of C tokens, FLOPs (a causal kernel could skip half of those with C², none here does):

        forward   P = q kᵀ    2C²K      P v       2C²V      kᵀ v      2CKV      q S       2CKV
        backward  Pᵀ dO       2C²V      dP = dO vᵀ 2C²V     dP k      2C²K      dPᵀ q     2C²K
                  qᵀ dO       2CKV      dO Sᵀ     2CKV      v dSᵀ     2CKV      k dS      2CKV

    In all 6C(K+V) + 12KV a token and head: 172 thousand for C = 64, K = 64, V = 128.
    """
    count = x.heads * x.time // chunk
    q, k, v, do = (part.reshape(count, chunk, -1) for part in (x.q, x.k, x.v, x.grad))
    dtype = x.q.dtype
    keys, values = (torch.empty(count, chunk, width, dtype=dtype) for width in (x.key, x.value))
    scores = torch.ones(count, chunk, chunk, dtype=dtype)
    state = torch.ones(count, x.key, x.value, dtype=dtype)
    # Results go elsewhere than to what is read: a repeated product of random numbers would overflow.
    square, rectangle = torch.empty_like(scores), torch.empty_like(state)
    products = [
        (q, k.mT, square),
        (scores, v, values),
        (k.mT, v, rectangle),
        (q, state, values),
        (scores.mT, do, values),
        (do, v.mT, square),
        (scores, k, keys),
        (scores.mT, q, keys),
        (q.mT, do, rectangle),
        (do, state.mT, keys),
        (v, state.mT, keys),
        (k, state, values),
    ]
    flops = x.heads * x.time * (6 * chunk * (x.key + x.value) + 12 * x.key * x.value)
    assert flops == sum(2 * math.prod(left.shape) * right.shape[-1] for left, right, _ in products)

    def all_products() -> None:
        for left, right, out in products:
            torch.bmm(left, right, out=out)

    return all_products


def flash_linear_attention(x: Inputs) -> Function | str:
    """Its own call in its own layout [B,T,H,·], with the same decays. The function, or why it cannot be had."""
    try:
        from fla.ops.retention import chunk_retention
    except ImportError as error:
        return f"missing: {error.name} (pip install flash-linear-attention)"
    q, k, v = (x.learns(part.transpose(1, 2).contiguous()) for part in (x.q, x.k, x.v))
    grad = x.grad.transpose(1, 2).contiguous()
    return lambda: torch.autograd.grad(chunk_retention(q, k, v, scale=1.0)[0], (q, k, v), grad)
