"""Scales of an imported model, measured on a text: our norms divide by what theirs does not have.

Where ours has one RMSNorm more before a matrix, W·h/rms(h) stands for W·h. With W times the mean of rms(h) over the
tokens the difference is least in squares, if |W·h| grows with rms(h). One pass over a text sets all matrices, layer by
layer, each on what the layers before it give with theirs.

Shapes: B batch, T tokens, D hidden size, H heads, V value size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kabrn_dist.data.dataset import Batch
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.model.block import Block
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.activation_quant import rms_norm
from kabrn_dist.ops.heads import norm_heads

ROW_TOKENS = 256
CALIBRATION_ROWS = 4
# The gate's logit at the mean input; its swish is far from zero there.
_GATE_LOGIT = 2.0


def default_text() -> str:
    """Return English text that every Python brings along: the documentation of its statements."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def encode_rows(text: str, tokenizer: Tokenizer, vocab_size: int) -> Batch:
    """Return the beginning of a text as a few documents of one row each.

    Args:
        text: The text; a short one is repeated.
        tokenizer: The model's.
        vocab_size: Rows of its embedding.
    """
    ids = [n for n in tokenizer.encode(text[: CALIBRATION_ROWS * ROW_TOKENS * 32]) if n < vocab_size] or [0]
    body = (ids * (CALIBRATION_ROWS * ROW_TOKENS // len(ids) + 1))[: CALIBRATION_ROWS * ROW_TOKENS]
    rows = torch.tensor(body).view(CALIBRATION_ROWS, ROW_TOKENS)
    tokens = torch.cat([torch.full((CALIBRATION_ROWS, 1), tokenizer.document_token), rows[:, :-1]], 1)
    positions = torch.arange(ROW_TOKENS).expand(CALIBRATION_ROWS, -1)
    zeros = torch.zeros(CALIBRATION_ROWS, ROW_TOKENS, dtype=torch.int64)
    return Batch(tokens, rows, zeros, positions, torch.zeros(CALIBRATION_ROWS, dtype=torch.int64))


@torch.no_grad()
def calibrate(model: MixKABRN, batch: Batch, kind: str) -> float:
    """Scale the matrices behind our additional norms, in place, and set gates that theirs has not.

    Args:
        model: Our model with their weights, plain.
        batch: A text.
        kind: "retnet" or "llama".

    Returns:
        Mean loss on the text with the scales, in nats per token.
    """
    with _hooks(model, kind):
        model(batch)
    return float(model(batch).language) / batch.tokens.numel()


@contextmanager
def _hooks(model: MixKABRN, kind: str) -> Iterator[None]:
    handles: list[Any] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        experts: Any = block.mixture.shared
        handles.append(experts.register_forward_pre_hook(_scale_down))
        output: Any = block.mixer.output
        if kind == "retnet":
            handles.append(output.register_forward_pre_hook(_scale_out))
            continue
        inputs: Any = block.mixer.inputs
        handles.append(inputs.register_forward_pre_hook(_set_gate))
        handles.append(inputs.register_forward_hook(_make_scale_heads(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_rms(x: Tensor) -> float:
    return float(x.float().square().mean(-1).sqrt().mean())


def _scale_down(experts: Any, arguments: Sequence[Any]) -> None:
    rows = arguments[0].codes / arguments[0].scale
    hidden = F.silu(rows @ experts.gate[0].T) * (rows @ experts.up[0].T)
    experts.down.mul_(_mean_rms(hidden))


def _scale_out(output: Any, arguments: Sequence[Any]) -> None:
    mixed, gate = arguments
    output.out.weight.mul_(_mean_rms(norm_heads(mixed, output.eps) * F.silu(gate)))


def _set_gate(inputs: Any, arguments: Sequence[Any]) -> None:
    """Make a gate that is the same for all channels, so that the norm behind it cancels it where it is positive."""
    mean = rms_norm(arguments[0]).flatten(0, 1).mean(0)
    row = mean * (_GATE_LOGIT / float(mean.square().sum().clamp(min=1e-12)))
    inputs.gate.weight.copy_(row.expand_as(inputs.gate.weight))


def _make_scale_heads(output: Any) -> Callable[[nn.Module, Any, Any], None]:
    """Scale the columns of each head by the size that softmax attention gives it, of which our norm leaves 1."""

    def scale(_: nn.Module, __: Any, outputs: tuple[Tensor, ...]) -> None:
        q, k, v, _gate = outputs
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        sizes = heads.float().square().mean(-1).sqrt().mean((0, 2))
        output.out.weight.mul_(sizes.repeat_interleave(v.shape[-1]))

    return scale
