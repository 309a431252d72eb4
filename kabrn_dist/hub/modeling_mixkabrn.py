"""A Mixture of Kolmogorov-Arnold Bit Retentive Networks for transformers, in plain operations of torch.

Self-contained: exports carry a copy of this file, which needs torch and transformers (4.57 or newer) and nothing else.

    x = embedding; x = x + mixer(x); x = x + experts(x); …; logits = head(norm(x))

A mixer is multi-scale retention (RetNet, arXiv 2307.08621), whose state has one size at any length, or softmax
attention. Experts are small Kolmogorov-Arnold networks (KAN, arXiv 2404.19756; KAT, arXiv 2409.10594). Their matrices
and those of mixers are ternary with int8 inputs (BitNet b1.58, arXiv 2402.17764).

On a CPU sums are taken in the order of the trainer's kernels (`sum_rows`), so that fp32 gives its logits to the last
bit: a sum in another order would round some input to the next int8 code now and then.

Shapes:
    B: batch. T: tokens. D: hidden size. H: heads. K, V: key and value width of a head. N: rows, of B·T tokens.
    E: experts. I, O: inputs and outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from kabrn_dist.hub.configuration_mixkabrn import MixKABRNConfig

# Numbers that are summed side by side, as the trainer's kernels do.
LANES = 16
NORM_EPS, MIN_ABSMAX = 1e-6, 1e-5
# Retained values can be almost nothing at a document's start, where a smaller one would blow up noise.
RETENTION_NORM_EPS, ATTENTION_NORM_EPS = 1e-2, 1e-6
# Queries whose attention mask is in memory at a time; tokens whose states are.
QUERY_BLOCK, RECURRENT_BLOCK = 512, 16
# The part of a Gaussian latent's variance that its ternary code keeps.
TERNARY_VARIANCE = 0.4386
# Parts that half precision would spoil: they stay in fp32, as in training.
_FUNCTIONS = ("inner", "outer", "inner_numerator", "inner_denominator", "outer_numerator", "outer_denominator")
FP32_PARTS = ("router", "convolution", "scales", *_FUNCTIONS)


# --- Sums, norms and rounding -----------------------------------------------------------------------------------------


def sum_rows(x: Tensor, groups: int = 1) -> Tensor:
    """Sum rows [N,D] → [N,1]; on a CPU in 16 lanes, each group of channels padded to whole vectors of lanes."""
    if x.device.type != "cpu":
        return x.sum(-1, keepdim=True)
    parts = x.reshape(len(x), groups, x.shape[1] // groups)
    vectors = F.pad(parts, (0, -parts.shape[-1] % LANES)).view(len(x), -1, LANES).unbind(1)
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    lanes = total.unbind(1)
    out = lanes[0].clone()
    for lane in lanes[1:]:
        out += lane
    return out[:, None]


def inverse_rms(x: Tensor, eps: float, groups: int = 1) -> Tensor:
    """Return 1 / root mean square [N,1] of rows [N,D]."""
    return (sum_rows(x * x, groups) / x.shape[1] + eps).rsqrt()


def rms_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Divide by the root mean square over the last dimension, in fp32; no gain. The dtype stays."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def code_scale(largest: Tensor) -> Tensor:
    """Return the scale of int8 codes of rows by their largest magnitude [N,1]."""
    # Not 127 / largest, which torch takes as a product with the rounded reciprocal.
    return torch.full_like(largest, 127.0) / largest.clamp(min=MIN_ABSMAX)


class NormRows(Function):
    """Rows [N,D] fp32 divided by their root mean square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = inverse_rms(x, eps)
        ctx.save_for_backward(x, norm)
        return x * norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, norm = ctx.saved_tensors
        return norm * (grad - norm * norm * (grad * x).mean(-1, keepdim=True) * x), None


class NormalizeAndRound(Function):
    """Rows [N,D] fp32 → their norm's int8 codes (whole numbers in fp32) and 127 / largest magnitude [N,1].

    Without rounding: the norm itself, and ones. The gradient passes the rounding unchanged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, rounded: bool) -> tuple[Tensor, Tensor]:
        norm = inverse_rms(x, NORM_EPS, groups)
        largest = norm * x.abs().amax(-1, keepdim=True)
        scale = code_scale(largest) if rounded else torch.ones_like(norm)
        times = norm * scale
        ctx.save_for_backward(x, norm, times)
        ctx.mark_non_differentiable(scale)
        return (x * times).round() if rounded else x * times, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        x, norm, times = ctx.saved_tensors
        return times * (grad - norm * norm * (grad * x).mean(-1, keepdim=True) * x), None, None


class Round(Function):
    """Values times a scale, rounded to whole numbers; the gradient passes the rounding unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return (x * scale).round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class Rows(NamedTuple):
    """Rows as a product reads them: `codes / scale` is the value.

    Attributes:
        codes: [N,I] fp32, whole numbers −128…127; values where nothing is quantized.
        scale: [N,1] fp32.
    """

    codes: Tensor
    scale: Tensor

    def take(self, rows: Tensor) -> Rows:
        """Return some of the rows."""
        return Rows(self.codes[rows], self.scale[rows])


def normalize(x: Tensor, lam: float, groups: int = 1) -> Rows:
    """Return q(RMSNorm(x)) of rows [N,D]; with `lam` below 1 values go that far from the norm to their codes."""
    found = Rows(*NormalizeAndRound.apply(x.float(), groups, lam == 1))
    if not 0 < lam < 1:
        return found
    with torch.no_grad():
        values = found.codes
        scale = 127 / values.abs().amax(-1, keepdim=True).clamp(min=MIN_ABSMAX)
        step = lam * ((values * scale).round().clamp(-128, 127) / scale - values)
    return Rows(found.codes + step, found.scale)


def exponential(x: Tensor) -> Tensor:
    """Return eˣ of fp32, by the polynomial of the trainer's kernels."""
    x = x.clamp(-87, 87)
    shifted = x * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = torch.full_like(r, 1 / 720)
    for term in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + term
    return (p.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)


class Silu(Function):
    """x · sigmoid(x) of fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        share = 1 / (1 + exponential(-x)) if x.device.type == "cpu" else x.sigmoid()
        ctx.save_for_backward(x, share)
        return x * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, share = ctx.saved_tensors
        return grad * (share + x * share * (1 - share))


# --- Ternary matrices -------------------------------------------------------------------------------------------------


def round_weights(latents: Tensor, scale_group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return codes −1, 0, 1 [E,O,I] fp32 of latents and their scales γ, the mean |w|: [E,1,1] or [E,O,1].

    A γ is that of a matrix, or of a group of its outputs (BitNet b1.58, eq. 1–3).
    """
    latents = latents.detach()
    sums = latents.double().abs().sum(-1)
    size = min(scale_group_size or sums.shape[1], sums.shape[1])
    means = [group.sum(1) / (group.shape[1] * latents.shape[2]) for group in sums.split(size, 1)]
    gamma = torch.stack(means, 1).float().clamp(min=MIN_ABSMAX)
    gamma = gamma if scale_group_size is None else gamma.repeat_interleave(size, 1)[:, : sums.shape[1]]
    return (latents.float() / gamma[..., None]).round().clamp(-1, 1), gamma[..., None]


def unpack_codes(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return codes −1, 0, 1 in fp32 of uint8 with two bits a code, in blocks of 64 codes.

    Byte i of a block's 16 holds codes i, 16 + i, 32 + i and 48 + i, each plus 1, from its low bits up.
    """
    parts = torch.stack([(packed.view(-1, LANES) >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    return parts.reshape(-1)[: math.prod(shape)].view(*shape).float() - 1


class Matrices(NamedTuple):
    """Matrices as a product reads them.

    Attributes:
        latents: [E,O,I], which get the gradient; None for packed codes.
        codes: [E,O,I] fp32, or plain values where there is no γ.
        gamma: [E,1,1] or [E,O,1]; None for plain matrices.
    """

    latents: Tensor | None
    codes: Tensor
    gamma: Tensor | None

    def expert(self, number: int) -> Matrices:
        """Return one of the matrices, [O,I]."""
        latents = None if self.latents is None else self.latents[number]
        return Matrices(latents, self.codes[number], None if self.gamma is None else self.gamma[number])


class TernaryWeight(nn.Module):
    """One ternary matrix, or a stack of experts' matrices: latent weights, or packed codes and scales.

    Args:
        config: of the model.
        shape: [O,I] or [E,O,I].
        gain: standard deviation of the product at the start of training.
    """

    codes: Tensor

    def __init__(self, config: MixKABRNConfig, *shape: int, gain: float = 1.0) -> None:
        super().__init__()
        self.shape, self.gain = shape if len(shape) == 3 else (1, *shape), gain
        self.lam = float(config.quantization) if config.quantize else 0.0
        self.group = config.scale_group_size
        self.packed = config.quantize and config.weights == "ternary"
        if self.packed:
            groups = 1 if self.group is None else -(-self.shape[1] // self.group)
            self.register_buffer("codes", torch.zeros(-(-math.prod(shape) // 64) * 16, dtype=torch.uint8))
            # A parameter, because only those stay in fp32 when a model is loaded in half precision.
            self.scales = nn.Parameter(torch.ones(self.shape[0], groups), requires_grad=False)
        else:
            self.weight = nn.Parameter(torch.empty(*shape))
        self._seen: tuple[Any, ...] = ()
        self._rounded: tuple[Tensor, Tensor] | None = None

    def forward(self) -> Matrices:
        """Return the matrices as they are now."""
        if self.packed:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "this model holds packed ternary codes, which cannot be trained; load the export with latent "
                    "weights (mixkabrn export --format hf --weights latent), or call model.eval()"
                )
            return Matrices(None, *self._read(self.codes, self._unpack))
        latents = self.weight.view(self.shape)
        if self.lam == 1:
            return Matrices(latents, *self._read(self.weight, lambda: round_weights(latents, self.group)))
        if self.lam:
            codes, gamma = round_weights(latents, self.group)
            latents = latents + (self.lam * (codes * gamma - latents.detach().float())).to(latents.dtype)
        return Matrices(latents, latents.float(), None)

    def _unpack(self) -> tuple[Tensor, Tensor]:
        rows = self.shape[1]
        size = rows if self.group is None else min(self.group, rows)
        gamma = self.scales.float()
        gamma = gamma if self.group is None else gamma.repeat_interleave(size, 1)[:, :rows]
        return unpack_codes(self.codes, self.shape), gamma[..., None]

    def _read(self, source: Tensor, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Codes and scales, computed again only where `source` has changed."""
        seen = (source.data_ptr(), source._version, source.device, source.dtype)
        if self._rounded is None or self._seen != seen or self.training:
            self._rounded, self._seen = compute(), seen
        return self._rounded


class TernaryProduct(Function):
    """Codes [N,I] of rows times codes [O,I] of a matrix: whole numbers below 2²⁴, so fp32 is exact in any order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, latents: Tensor | None, codes: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(rows, codes, gamma)
        ctx.dtype = None if latents is None else latents.dtype
        return rows @ codes.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, codes, gamma = ctx.saved_tensors
        # Straight through: a latent's slope is that of γ·code.
        grad_latents = None if ctx.dtype is None else ((grad.T @ rows) / gamma).to(ctx.dtype)
        return grad @ codes, grad_latents, None, None


def multiply(x: Rows, matrix: Matrices) -> Tensor:
    """Multiply rows by one matrix: [N,O] fp32."""
    product = multiply_unscaled(x, matrix, scaled=True)
    return product.codes * product.scale


def multiply_unscaled(x: Rows, matrix: Matrices, scaled: bool = False) -> Rows:
    """Multiply rows by one matrix, and leave the scaling of rows to the reader.

    Returns:
        The product and its scale, or with `scaled` the factor in its place.
    """
    if matrix.gamma is None:
        return Rows(x.codes @ matrix.codes.T, x.scale.reciprocal() if scaled else x.scale)
    product = TernaryProduct.apply(x.codes, matrix.latents, matrix.codes, matrix.gamma)
    factor = x.scale.reciprocal()
    if matrix.gamma.numel() == 1:
        factor = factor * matrix.gamma
    elif scaled:
        # Rows' factors come first, then those of the outputs.
        return Rows(product * factor * matrix.gamma.T, torch.ones_like(factor))
    else:
        product = product * matrix.gamma.T
    return Rows(product, factor if scaled else factor.reciprocal())


# --- Mixers -----------------------------------------------------------------------------------------------------------


class Positions(NamedTuple):
    """Where the tokens stand, the same for all layers.

    Attributes:
        documents: [B,T] int64, never falling along a row; pads are documents of their own.
        positions: [B,T] int64, within documents; 0 begins one.
        before: [B] int64, the document of the token in front of the first.
        cos: [B,1,T,K/2] fp32, of the rotary angles.
        sin: [B,1,T,K/2] fp32.
        recurrent: whether retention reads tokens one after another.
    """

    documents: Tensor
    positions: Tensor
    before: Tensor
    cos: Tensor
    sin: Tensor
    recurrent: bool


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (first half, second half) of heads [B,H,T,K] by their angles (RoFormer, arXiv 2104.09864)."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


def log_decays(config: MixKABRNConfig) -> list[float]:
    """Return log γ of each head."""
    fastest, slowest = config.decay
    step = (slowest - fastest) / max(1, config.num_heads - 1)
    return [math.log1p(-(2.0 ** -(fastest + head * step))) for head in range(config.num_heads)]


def retain_recurrently(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, position: Positions, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Read tokens one after another: S = γ·S + kᵀv, o = qS, with S = 0 where a document starts; keys sum in fours."""
    decay, starts = log_decay.double().exp().float()[:, None, None], position.positions == 0
    outs = []
    for first in range(0, q.shape[2], RECURRENT_BLOCK):
        states = []
        for t in range(first, min(first + RECURRENT_BLOCK, q.shape[2])):
            state = state * ~starts[:, t, None, None, None] * decay + k[:, :, t, :, None] * v[:, :, t, None, :]
            states.append(state)
        products = q[:, :, first : first + len(states), :, None] * torch.stack(states, 2)
        fours = []
        for four in products.split(4, 3):
            part = four[:, :, :, 0] + four[:, :, :, 1]
            fours.append(part if four.shape[3] == 2 else part + (four[:, :, :, 2] + four[:, :, :, 3]))
        total = fours[0]
        for part in fours[1:]:
            total = total + part
        outs.append(total)
    return torch.cat(outs, 2), state


def retain_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, position: Positions, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Compute the same chunk by chunk (RetNet, eq. 7): scores within a chunk, the state between chunks."""
    decay, before, outs = log_decay[:, None, None], position.before, []
    for first in range(0, q.shape[2], size):
        part = slice(first, min(first + size, q.shape[2]))
        queries, keys, values, documents = q[:, :, part], k[:, :, part], v[:, :, part], position.documents[:, part]
        place = torch.arange(queries.shape[2], device=q.device)
        last, length = documents[:, -1], len(place)
        within = ((place[:, None] - place).clamp(min=0) * decay).exp().tril()
        same = documents[:, None, :, None] == documents[:, None, None, :]
        reached = ((place[:, None] + 1) * decay).exp() * (documents == before[:, None])[:, None, :, None]
        kept = ((length - 1 - place[:, None]) * decay).exp() * (documents == last[:, None])[:, None, :, None]
        scores = queries @ keys.transpose(-1, -2) * within * same
        outs.append(scores @ values + (queries * reached) @ state)
        state = state * (length * decay).exp() * (last == before)[:, None, None, None]
        state = state + (keys * kept).transpose(-1, -2) @ values
        before = last
    return torch.cat(outs, 2), state


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Return each query's attention over the keys of its document up to its own position.

    Args:
        q: [B,H,T,K], of the last T of S tokens.
        k: [B,H,S,K].
        v: [B,H,S,V].
        documents: [B,S] int64, never falling along a row.
    """
    tokens, seen, keys, values = q.shape[2], k.shape[2], k.shape[-1], v.shape[-1]
    width = max(keys, values)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    asked = torch.cat([documents[:, seen - tokens :: QUERY_BLOCK], documents[:, -1:]], 1)
    found = torch.searchsorted(documents.contiguous(), asked)
    *firsts, latest = torch.cat([found[:, :-1].amin(0), found[:, -1:].amax(0)]).tolist()
    if latest == 0 and tokens == seen:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=keys**-0.5)[..., :values]
    outs = []
    for first, start in zip(firsts, range(0, tokens, QUERY_BLOCK), strict=True):
        stop = min(start + QUERY_BLOCK, tokens)
        past = slice(first, seen - tokens + stop)
        own = documents[:, seen - tokens + start : seen - tokens + stop, None]
        mask = (own == documents[:, None, past]).tril(seen - tokens + start - first)[:, None]
        part = q[:, :, start:stop], k[:, :, past], v[:, :, past]
        outs.append(F.scaled_dot_product_attention(*part, attn_mask=mask, scale=keys**-0.5))
    return torch.cat(outs, 2)[..., :values]


class ShortConvolution(nn.Module):
    """x_t + Σ_j w_j ⊙ x_{t−j} over the few tokens before t in its document.

    Args:
        config: of the model.
    """

    def __init__(self, config: MixKABRNConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.short_conv_size - 1, config.hidden_size))

    def forward(self, x: Tensor, before: Tensor | None, position: Positions) -> tuple[Tensor, Tensor]:
        """Return the result [B,T,D], and the last inputs [B,J,D], the `before` of the next call."""
        taps = len(self.weight)
        row = torch.cat([x.new_zeros(len(x), taps, x.shape[2]) if before is None else before, x], 1)
        out, weight = x.float(), self.weight.float()
        for j in range(1, taps + 1):
            shifted = row[:, taps - j : row.shape[1] - j].float()
            out = out + torch.where((position.positions >= j)[..., None], shifted * weight[j - 1], 0.0)
        return out.to(x.dtype), row[:, row.shape[1] - taps :]


class Mixer(nn.Module):
    """Retention or attention: queries, keys, values and a gate from one input, and a projection of what is mixed.

    Args:
        config: of the model.
        kind: "R" or "A".
        gain: of the output at the start of training.
    """

    def __init__(self, config: MixKABRNConfig, kind: str, gain: float) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        self.lam = float(config.quantization) if config.quantize else 0.0
        keys, values = config.num_heads * config.key_dim, config.num_heads * config.value_dim
        self.convolution = ShortConvolution(config) if config.short_conv_size else None
        self.query = TernaryWeight(config, keys, config.hidden_size)
        self.key = TernaryWeight(config, keys, config.hidden_size)
        self.value = TernaryWeight(config, values, config.hidden_size)
        self.gate = TernaryWeight(config, values, config.hidden_size)
        self.out = TernaryWeight(config, config.hidden_size, values, gain=gain)

    def forward(self, x: Tensor, position: Positions, state: LayerState) -> Tensor:
        """Mix tokens [B,T,D] → [B,T,D] fp32; reads and writes the layer's state."""
        if self.convolution is not None:
            x, state.mixer_inputs = self.convolution(x, state.mixer_inputs, position)
        rows = normalize(x.flatten(0, 1), self.lam)
        q, k, v = (
            multiply(rows, weight().expert(0)).view(*x.shape[:2], self.config.num_heads, -1).transpose(1, 2)
            for weight in (self.query, self.key, self.value)
        )
        q, k = rotate(q, position.cos, position.sin), rotate(k, position.cos, position.sin)
        gate = multiply(rows, self.gate().expert(0))
        mix, eps = (self._retain, RETENTION_NORM_EPS) if self.kind == "R" else (self._attend, ATTENTION_NORM_EPS)
        mixed = mix(q, k, v, position, state)
        heads = NormRows.apply(mixed.transpose(1, 2).reshape(-1, self.config.value_dim), eps)
        values = normalize(Silu.apply(gate) * heads.view(gate.shape), self.lam)
        return multiply(values, self.out().expert(0)).view(x.shape)

    def _retain(self, q: Tensor, k: Tensor, v: Tensor, position: Positions, state: LayerState) -> Tensor:
        # Made in each call: γ is 1 in bf16 from the fourth head on, and no cast of the model may round it.
        log_decay = torch.tensor(log_decays(self.config), device=q.device)
        q = q * self.config.key_dim**-0.5
        before = state.retained
        if before is None:
            before = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        if position.recurrent:
            mixed, state.retained = retain_recurrently(q, k, v, log_decay, position, before)
        else:
            mixed, state.retained = retain_in_chunks(q, k, v, log_decay, position, before, self.config.chunk_size)
        return mixed

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, position: Positions, state: LayerState) -> Tensor:
        q, k, documents = rms_norm(q), rms_norm(k), position.documents
        if state.keys is not None and state.values is not None and state.documents is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
            documents = torch.cat([state.documents, documents], 1)
        state.keys, state.values, state.documents = k, v, documents
        return attend(q, k, v, documents)


# --- Experts ----------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """The experts of a layer, stacked. Each takes rows that are normalized and rounded once for all of them.

    Args:
        config: of the model.
        count: number of experts.
        hidden: width of their hidden layer.
        gain: of the output at the start of training.
    """

    def __init__(self, config: MixKABRNConfig, count: int, hidden: int, gain: float) -> None:
        super().__init__()
        self.config, self.count, self.hidden, self.gain = config, count, hidden, gain
        self.lam = float(config.quantization) if config.quantize else 0.0

    def read(self) -> dict[str, Matrices]:
        """Return the matrices by name."""
        return {name: part() for name, part in self.named_children() if isinstance(part, TernaryWeight)}

    def apply_expert(self, number: int, x: Rows, matrices: dict[str, Matrices]) -> Tensor:
        """Return the output [n,D] fp32 of one expert for rows [n,D]."""
        raise NotImplementedError(type(self).__name__)


class GroupedExperts(Experts):
    """y = W₂ q(φ₂(W₁ q(φ₁(x)))), q = RMSNorm and int8; φ is one learned function per group of channels."""

    def __init__(self, config: MixKABRNConfig, count: int, hidden: int, gain: float) -> None:
        super().__init__(config, count, hidden, gain)
        self.up = TernaryWeight(config, count, hidden, config.hidden_size)
        self.down = TernaryWeight(config, count, config.hidden_size, hidden, gain=gain)

    def apply_expert(self, number: int, x: Rows, matrices: dict[str, Matrices]) -> Tensor:
        """See `Experts`."""
        hidden = multiply_unscaled(self._activate("inner", number, x), matrices["up"].expert(number))
        return multiply(self._activate("outer", number, hidden), matrices["down"].expert(number))

    def _activate(self, layer: str, number: int, x: Rows) -> Rows:
        groups = self.config.function_groups
        z = (x.codes * self._factor(x.scale)).view(len(x.codes), groups, -1)
        return normalize(self.function(layer, number, z).reshape(x.codes.shape), self.lam, groups)

    def _factor(self, scale: Tensor) -> Tensor:
        return scale.reciprocal()

    def function(self, layer: str, number: int, z: Tensor) -> Tensor:
        """Return φ₁ ("inner") or φ₂ ("outer") of z [n,G,D/G]."""
        raise NotImplementedError(type(self).__name__)


class RationalExperts(GroupedExperts):
    """φ = P(z) / (1 + |A(z)|), P of degree 5 and A of degree 4 (Padé activation units, arXiv 1907.06732)."""

    inner_numerator: Tensor
    inner_denominator: Tensor
    outer_numerator: Tensor
    outer_denominator: Tensor

    def __init__(self, config: MixKABRNConfig, count: int, hidden: int, gain: float) -> None:
        super().__init__(config, count, hidden, gain)
        groups = config.function_groups
        for layer in ("inner", "outer"):
            self.register_parameter(f"{layer}_numerator", nn.Parameter(torch.empty(count, groups, 6)))
            self.register_parameter(f"{layer}_denominator", nn.Parameter(torch.empty(count, groups, 4)))

    def function(self, layer: str, number: int, z: Tensor) -> Tensor:
        """See `GroupedExperts`."""
        a, b = (
            [c[:, None] for c in self.get_parameter(f"{layer}_{part}")[number].float().unbind(1)]
            for part in ("numerator", "denominator")
        )
        p = ((((a[5] * z + a[4]) * z + a[3]) * z + a[2]) * z + a[1]) * z + a[0]
        inner = (((b[3] * z + b[2]) * z + b[1]) * z + b[0]) * z
        return p * (1 + inner.abs()).reciprocal()


class ChebyshevExperts(GroupedExperts):
    """φ = Σ cₙTₙ(u), n = 0…3, u being z with the range mapped to [−1,1]; a straight line outside."""

    inner: Tensor
    outer: Tensor

    def __init__(self, config: MixKABRNConfig, count: int, hidden: int, gain: float) -> None:
        super().__init__(config, count, hidden, gain)
        for layer in ("inner", "outer"):
            self.register_parameter(layer, nn.Parameter(torch.empty(count, config.function_groups, 4)))

    def _factor(self, scale: Tensor) -> Tensor:
        return scale.reciprocal() / torch.tensor(self._range()[1], device=scale.device)

    def _range(self) -> tuple[float, float]:
        low, high = self.config.grid_range
        return (low + high) / 2, (high - low) / 2

    def function(self, layer: str, number: int, z: Tensor) -> Tensor:
        """See `GroupedExperts`; z comes divided by half the width of the range."""
        c = [part[:, None] for part in self.get_parameter(layer)[number].float().unbind(1)]
        center, reach = (torch.tensor(end, device=z.device) for end in self._range())
        z = z - center / reach
        u = z.clamp(-1, 1)
        t2 = 2 * u * u - 1
        t3 = 2 * u * t2 - u
        slope = c[1] + 4 * c[2] * u + c[3] * (6 * t2 + 3)
        return c[0] + c[1] * u + c[2] * t2 + c[3] * t3 + slope * (z - u)


class Relu2Experts(Experts):
    """y = W₂ q(relu(RMSNorm(W₁x))²), an MLP of two matrices (Primer, arXiv 2109.08668)."""

    def __init__(self, config: MixKABRNConfig, count: int, hidden: int, gain: float) -> None:
        super().__init__(config, count, hidden, gain)
        self.up = TernaryWeight(config, count, hidden, config.hidden_size)
        self.down = TernaryWeight(config, count, config.hidden_size, hidden, gain=gain)

    def apply_expert(self, number: int, x: Rows, matrices: dict[str, Matrices]) -> Tensor:
        """See `Experts`."""
        up = multiply_unscaled(x, matrices["up"].expert(number))
        z = NormRows.apply(up.codes * up.scale.reciprocal(), NORM_EPS)
        return multiply(normalize(F.relu(z) * z, self.lam), matrices["down"].expert(number))


class SwigluExperts(Experts):
    """y = W₃ q(silu(W₁x) · W₂x), a gated MLP (arXiv 2002.05202)."""

    def __init__(self, config: MixKABRNConfig, count: int, hidden: int, gain: float) -> None:
        super().__init__(config, count, hidden, gain)
        self.gate = TernaryWeight(config, count, hidden, config.hidden_size)
        self.up = TernaryWeight(config, count, hidden, config.hidden_size)
        self.down = TernaryWeight(config, count, config.hidden_size, hidden, gain=gain)

    def apply_expert(self, number: int, x: Rows, matrices: dict[str, Matrices]) -> Tensor:
        """See `Experts`."""
        gate, up = (multiply_unscaled(x, matrices[name].expert(number)) for name in ("gate", "up"))
        gated = Silu.apply(gate.codes * gate.scale.reciprocal()) * (up.codes * up.scale.reciprocal())
        return multiply(normalize(gated, self.lam), matrices["down"].expert(number))


class SplineExperts(Experts):
    """Two layers with b·silu(x) + Σₖ sₖBₖ(x) on every edge (KAN, eq. 2.10), on a uniform grid of B-splines Bₖ.

    Outside the grid functions go on in straight lines. Type "hat" has splines of degree 1.
    """

    def __init__(self, config: MixKABRNConfig, count: int, hidden: int, gain: float) -> None:
        super().__init__(config, count, hidden, gain)
        self.degree = 1 if config.expert_type == "hat" else config.spline_order
        self.size = config.grid_size + self.degree
        width = config.hidden_size
        self.inner_base = TernaryWeight(config, count, hidden, width)
        self.inner_spline = TernaryWeight(config, count, hidden, width * self.size)
        self.outer_base = TernaryWeight(config, count, width, hidden, gain=gain)
        self.outer_spline = TernaryWeight(config, count, width, hidden * self.size, gain=gain)

    def apply_expert(self, number: int, x: Rows, matrices: dict[str, Matrices]) -> Tensor:
        """See `Experts`."""
        hidden = rms_norm(self._layer("inner", number, x.codes / x.scale, matrices))
        return self._layer("outer", number, hidden, matrices)

    def _layer(self, layer: str, number: int, x: Tensor, matrices: dict[str, Matrices]) -> Tensor:
        base, spline = (matrices[f"{layer}_{branch}"].expert(number) for branch in ("base", "spline"))
        silu, values = Silu.apply(x), self._splines(x)
        if base.gamma is None or spline.gamma is None:
            matrix = torch.cat([self._turn(spline.codes, x.shape[1]), base.codes], 1)
            return torch.cat([values.flatten(1), silu], 1) @ matrix.T
        silu_scale = code_scale(silu.detach().abs().amax(-1, keepdim=True))
        spline_scale = code_scale(self._bound(x.detach()))
        codes = Round.apply(silu, silu_scale), Round.apply(values.flatten(1), spline_scale)
        latents = None if spline.latents is None else self._turn(spline.latents, x.shape[1])
        turned = Matrices(latents, self._turn(spline.codes, x.shape[1]), spline.gamma)
        out = TernaryProduct.apply(codes[0], *base) * (base.gamma / silu_scale)
        return torch.addcmul(out, TernaryProduct.apply(codes[1], *turned), spline.gamma / spline_scale)

    def _turn(self, matrix: Tensor, inputs: int) -> Tensor:
        """[O,I·K] with the K of an input together → [O,K·I] with the inputs of a function together."""
        return matrix.unflatten(-1, (inputs, self.size)).transpose(-1, -2).flatten(-2)

    def _ends(self) -> tuple[list[float], list[float]]:
        """Values at the low end of the first functions, and their slopes a step."""
        values = cox_de_boor(0.0, self.degree)
        lower = [0.0, *cox_de_boor(0.0, self.degree - 1), 0.0]
        return values, [lower[r] - lower[r + 1] for r in range(self.degree + 1)]

    def _splines(self, x: Tensor) -> Tensor:
        """All basis functions of x [n,I]: [n,K,I]. Of an x only degree + 1 are not zero."""
        low, high = self.config.grid_range
        intervals, degree, (_, slopes) = self.config.grid_size, self.degree, self._ends()
        place = (x - low) * (intervals / (high - low))
        inside = place.clamp(0, intervals)
        beyond = place - inside
        interval = inside.detach().floor().clamp(max=intervals - 1)
        values = cox_de_boor(inside - interval, degree)
        below, above = beyond.clamp(max=0), beyond.clamp(min=0)
        first = torch.arange(self.size, device=x.device)[:, None] - interval.long()[:, None]
        out = torch.zeros(len(x), self.size, x.shape[1], device=x.device)
        for r in range(degree + 1):
            value = values[r] + (below * slopes[r] - above * slopes[degree - r])
            out = torch.where(first == r, value[:, None], out)
        return out

    def _bound(self, x: Tensor) -> Tensor:
        """A bound on the size of the basis functions of each row [n,1]; outside the grid their tangents decide."""
        (low, high), (values, slopes) = self.config.grid_range, self._ends()
        far = (x - 0.5 * (low + high)).abs().amax(-1, keepdim=True)
        beyond = ((far - 0.5 * (high - low)) * (self.config.grid_size / (high - low))).clamp(min=0)
        most = torch.full_like(beyond, self._peak())
        for value, slope in zip(values, slopes, strict=True):
            most = torch.maximum(most, (value - beyond * slope).abs())
        return most

    def _peak(self) -> float:
        """The largest value of a basis function inside the grid (Schoenberg 1946)."""
        total, reach = torch.zeros(1), (self.degree + 1) / 2
        if self.degree == 1:
            return 1.0
        for i in range(self.degree // 2 + 1):
            sign = (-1) ** i * math.comb(self.degree + 1, i) / math.factorial(self.degree)
            total = total + (reach - i - torch.zeros(1)).clamp(min=0).pow(self.degree) * sign
        return float(total)


def cox_de_boor(place: Any, degree: int) -> list[Any]:
    """Return the degree + 1 B-splines on unit knots that are not zero, at a place 0…1 of an interval."""
    values: list[Any] = [place * 0.0 + 1.0]
    for p in range(1, degree + 1):
        padded = [0.0, *values, 0.0]
        values = [((place + (p - r)) * padded[r] + ((r + 1) - place) * padded[r + 1]) * (1.0 / p) for r in range(p + 1)]
    return values


EXPERT_TYPES: dict[str, type[Experts]] = {
    "rational": RationalExperts,
    "chebyshev": ChebyshevExperts,
    "relu2": Relu2Experts,
    "swiglu": SwigluExperts,
    "hat": SplineExperts,
    "bspline": SplineExperts,
}


class Router(nn.Module):
    """Scores all experts for each token and chooses the best; the bias counts in the choice only.

    Args:
        config: of the model.
    """

    bias: Tensor

    def __init__(self, config: MixKABRNConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return numbers and weights [N,k] of the experts of tokens [N,D] fp32."""
        config, weight = self.config, self.weight.float()
        # Outside training rounded from fp64, so that no order of a sum shows in the choice.
        logits = F.linear(x, weight) if self.training else F.linear(x.double(), weight.double())
        scores = (logits.sigmoid() if config.score_func == "sigmoid" else logits.softmax(-1)).float()
        with torch.no_grad():
            chosen = self._choose(scores + self.bias.float())
        weights = scores.gather(-1, chosen)
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights

    def _choose(self, scores: Tensor) -> Tensor:
        config = self.config
        if config.topk_group is not None and config.topk_group < config.n_group:
            grouped = scores.unflatten(-1, (config.n_group, -1))
            # A group is rated by its best experts (DeepSeek-V3, arXiv 2412.19437).
            best = min(max(1, config.num_experts_per_tok // config.topk_group), grouped.shape[-1])
            rating = grouped.topk(best, -1).values.sum(-1)
            allowed = torch.zeros_like(rating, dtype=torch.bool)
            allowed.scatter_(-1, choose_best(rating, config.topk_group), True)
            scores = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
        return choose_best(scores, config.num_experts_per_tok)


def choose_best(scores: Tensor, count: int) -> Tensor:
    """Return the indices [N,count] of the largest, best first, ties by the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


class FeedForward(nn.Module):
    """x → Σ weight·routed(x) + Σ shared(x), or one dense network.

    Args:
        config: of the model.
        mixture: whether there are routed experts.
        gain: of the output at the start of training.
    """

    def __init__(self, config: MixKABRNConfig, mixture: bool, gain: float) -> None:
        super().__init__()
        make = EXPERT_TYPES[config.expert_type]
        self.lam = float(config.quantization) if config.quantize else 0.0
        hidden, shared = config.expert_hidden_size, config.num_shared_experts
        self.router = Router(config) if mixture else None
        self.routed = make(config, config.num_experts, hidden, gain) if mixture else None
        if not mixture:
            hidden, shared = config.dense_hidden_size, 1
        self.shared = make(config, shared, hidden, gain) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the experts to tokens [B,T,D] → [B,T,D] fp32."""
        rows = x.flatten(0, 1).float()
        tokens = normalize(rows, self.lam)
        outs: list[Tensor] = []
        if self.router is not None and self.routed is not None:
            chosen, weights = self.router(normalize(rows, 0.0).codes)
            routed, matrices = torch.zeros_like(rows), self.routed.read()
            for number in range(self.routed.count):
                members, place = (chosen == number).nonzero(as_tuple=True)
                if len(members):
                    out = self.routed.apply_expert(number, tokens.take(members), matrices)
                    routed = routed.index_add(0, members, out * weights[members, place, None])
            outs.append(routed)
        if self.shared is not None:
            matrices = self.shared.read()
            outs += [self.shared.apply_expert(number, tokens, matrices) for number in range(self.shared.count)]
        total = outs[0]
        for out in outs[1:]:
            total = total + out
        return total.view(x.shape)


# --- The model --------------------------------------------------------------------------------------------------------


class LayerState:
    """What a layer keeps of the tokens that it has read; None where it keeps nothing.

    Attributes:
        retained: [B,H,K,V] fp32, of a retention layer, whatever the number of tokens.
        keys: [B,H,S,K] of an attention layer.
        values: [B,H,S,V].
        documents: [B,S] int64.
        mixer_inputs: [B,J,D], the last inputs of the mixer's convolution.
        feed_forward_inputs: [B,J,D], those of the feed-forward's.
    """

    NAMES = ("retained", "keys", "values", "documents", "mixer_inputs", "feed_forward_inputs")
    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        self.retained: Tensor | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.documents: Tensor | None = None
        self.mixer_inputs: Tensor | None = None
        self.feed_forward_inputs: Tensor | None = None

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, e.g. by some of its rows."""
        for name in self.NAMES:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))


class MixKABRNCache(Cache):
    """States of all layers. Those of retention layers have one size; keys and values of attention layers grow.

    Args:
        layers: number of layers.

    Attributes:
        seen: tokens read so far, pads included.
        positions: [B] int64, the position of each row's next token in its document; None before the first.
        documents: [B] int64, the document of each row's last token.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[LayerState() for _ in range(layers)])
        self.seen = 0
        self.positions: Tensor | None = None
        self.documents: Tensor | None = None

    is_compileable = property(lambda self: False)
    is_initialized = property(lambda self: self.positions is not None)
    is_sliding = property(lambda self: [False] * len(self.layers))
    max_batch_size = property(lambda self: 0 if self.positions is None else len(self.positions))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read so far."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return −1: there is no longest text."""
        return -1

    def get_max_length(self, layer_idx: int = 0) -> int:
        """Return −1: there is no longest text."""
        return -1

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return the length and the offset of an attention mask over all tokens."""
        return self.seen + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, e.g. by some of its rows."""
        for layer in self.layers:
            layer.change(function)
        if self.positions is not None and self.documents is not None:
            self.positions, self.documents = function(self.positions), function(self.documents)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the beams that go on."""
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.change(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.change(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forget all tokens."""
        self.__init__(len(self.layers))  # type: ignore[misc]

    def crop(self, max_length: int) -> None:
        """Refuse: a retained state cannot forget its last tokens.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the state of a retention layer cannot be cropped; read the text again")


class MixKABRNBlock(GradientCheckpointingLayer):
    """x → x + Mixer(x), then x → x + FeedForward(x).

    Args:
        config: of the model.
        number: of the layer.
    """

    def __init__(self, config: MixKABRNConfig, number: int) -> None:
        super().__init__()
        gain = 1 / math.sqrt(2 * len(config.layers))
        self.mixer = Mixer(config, config.layers[number], gain)
        self.mixture = FeedForward(config, number in config.moe_layers, gain)
        self.convolution = ShortConvolution(config) if config.short_conv_size else None

    def forward(self, x: Tensor, position: Positions, state: LayerState | None = None) -> Tensor:
        """Apply the layer to the residual stream [B,T,D]; reads and writes the state."""
        # What nobody keeps is written into a state of this call.
        state = LayerState() if state is None else state
        x = x + self.mixer(x, position, state).to(x.dtype)
        inputs = x
        if self.convolution is not None:
            inputs, state.feed_forward_inputs = self.convolution(x, state.feed_forward_inputs, position)
        return x + self.mixture(inputs).to(x.dtype)


class MixKABRNPreTrainedModel(PreTrainedModel):
    """What both models share: how they are loaded, and how new ones begin."""

    config_class = MixKABRNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MixKABRNBlock"]
    # States cannot go back, so that there is no assisted generation.
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The model makes its own cache."""
        return False

    def _keep_in_fp32(self) -> None:
        """Name the parts of this model that stay in fp32; transformers refuses names that it does not find."""
        parts = {part for name, _ in self.named_parameters() for part in name.split(".")}
        self._keep_in_fp32_modules_strict = parts.intersection(FP32_PARTS)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a checkpoint did not bring."""
        if isinstance(module, TernaryWeight) and not module.packed:
            variance = TERNARY_VARIANCE if module.lam else 1.0
            nn.init.normal_(module.weight, std=module.gain / math.sqrt(module.shape[2] * variance))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Linear | Router):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, ShortConvolution):
            nn.init.zeros_(module.weight)
        elif isinstance(module, RationalExperts):
            _begin(module.inner_numerator, (0.0, 1.0, 0.0, 0.02, 0.0, 0.0))
            _begin(module.inner_denominator, (0.0, 0.02, 0.0, 0.0))
            _begin(module.outer_numerator, (0.0, 0.5, 0.249895, 0.052176, 0.005332, 0.0002195))
            _begin(module.outer_denominator, (0.0, 0.104352, 0.0, 0.000439))
        elif isinstance(module, ChebyshevExperts):
            for function in (module.inner, module.outer):
                _begin(function, (*module._range(), 0.0, 0.0))


def _begin(parameter: Tensor, values: Sequence[float]) -> None:
    """Set a parameter that no checkpoint has set."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(torch.tensor(values))


class MixKABRNModel(MixKABRNPreTrainedModel):
    """The model without its head.

    Args:
        config: of the model.
    """

    def __init__(self, config: MixKABRNConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([MixKABRNBlock(config, number) for number in range(len(config.layers))])
        self.gradient_checkpointing = False
        self._keep_in_fp32()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MixKABRNCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens.

        Args:
            input_ids: [B,T] int64.
            attention_mask: [B,T], or [B,S] of all tokens so far; 0 marks pads, which no other token sees.
            position_ids: [B,T]; 0 begins a document, which sees nothing of those before it in the row. Without it a
                row is one document, which the cache continues.
            past_key_values: what was read before.
            inputs_embeds: [B,T,D] in place of `input_ids`.
            use_cache: whether to return a cache, by default outside training.
            output_hidden_states: whether to return the stream after each layer.
            return_dict: False returns a tuple.
            **kwargs: not used.

        Raises:
            ValueError: for inputs that do not fit each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, MixKABRNCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; leave it out, or pass what this model returned"
            )
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (not self.training and self.config.use_cache) if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing:
            use_cache = False
        cache = past_key_values
        if use_cache and cache is None:
            cache = MixKABRNCache(len(self.blocks))
        position = self._locate(x, attention_mask, position_ids, cache)
        wanted = output_hidden_states or self.config.output_hidden_states
        hidden: tuple[Tensor, ...] = (x,) if wanted else ()
        for number, block in enumerate(self.blocks):
            x = block(x, position, state=None if cache is None else cache.layers[number])
            hidden += (x,) if wanted else ()
        if cache is not None:
            cache.seen += x.shape[1]
        out = BaseModelOutputWithPast(
            last_hidden_state=rms_norm(x),
            past_key_values=cache if use_cache else None,
            hidden_states=hidden or None,
        )
        return out if return_dict is not False else out.to_tuple()

    def _locate(
        self, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: MixKABRNCache | None
    ) -> Positions:
        """Return where the tokens stand, and note it in the cache."""
        batch, tokens = x.shape[:2]
        start = torch.zeros(batch, dtype=torch.int64, device=x.device)
        if cache is not None and cache.positions is not None and len(cache.positions) != batch:
            raise ValueError(f"{batch} rows on top of a cache of {len(cache.positions)}; begin with an empty cache")
        first = start if cache is None or cache.positions is None else cache.positions
        before = start if cache is None or cache.documents is None else cache.documents
        positions = first[:, None] + torch.arange(tokens, device=x.device)
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has {mask.ndim} dimensions; give one number for each token, [B,T]")
        real = None if mask is None else mask[:, -tokens:].to(x.device).bool()
        if real is not None and not bool(real.all()):
            if cache is not None and not bool(real[:, -1].all()):
                raise ValueError("a row ends with a pad, which its cache would go on from; pad on the left")
            positions = (first[:, None] + real.cumsum(1) - 1).masked_fill(~real, 0)
        elif position_ids is not None:
            positions = position_ids.to(x.device).expand(batch, tokens)
        documents = before[:, None] + (positions == 0).cumsum(1)
        half = self.config.key_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
        angles = positions[:, None, :, None] * frequencies
        recurrent = (
            self.config.retention_form != "chunkwise"
            and not self.training
            and not torch.is_grad_enabled()
            and (x.device.type, x.dtype) == ("cpu", torch.float32)
        )
        if cache is not None:
            cache.positions, cache.documents = positions[:, -1] + 1, documents[:, -1]
        return Positions(documents, positions, before, angles.cos().float(), angles.sin().float(), recurrent)


class MixKABRNForCausalLM(MixKABRNPreTrainedModel, GenerationMixin):
    """The model with its head, which generates text and can be trained.

    Args:
        config: of the model.
    """

    def __init__(self, config: MixKABRNConfig) -> None:
        super().__init__(config)
        self.model = MixKABRNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._keep_in_fp32()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MixKABRNCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read tokens; see `MixKABRNModel.forward`.

        Args:
            input_ids: [B,T] int64.
            attention_mask: [B,T] or [B,S].
            position_ids: [B,T].
            past_key_values: what was read before.
            inputs_embeds: [B,T,D].
            labels: [B,T] int64, the tokens themselves, −100 where one does not count: gives the mean cross-entropy.
            use_cache: whether to return a cache.
            output_hidden_states: whether to return the stream after each layer.
            return_dict: False returns a tuple.
            logits_to_keep: last tokens to compute logits of, or their numbers; 0 for all.
            **kwargs: of the loss.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels is None and not self.training if use_cache is None else use_cache,
            output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return result if return_dict is not False else result.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: MixKABRNCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of the next call: the tokens that the cache has not read."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": use_cache, "logits_to_keep": 1}
        if inputs_embeds is not None and seen < inputs_embeds.shape[1]:
            inputs["inputs_embeds"] = inputs_embeds[:, seen:]
        else:
            skipped = seen if inputs_embeds is None else seen - inputs_embeds.shape[1]
            inputs["input_ids"] = input_ids[:, skipped:]
        return inputs | {"attention_mask": attention_mask}


__all__ = ["MixKABRNCache", "MixKABRNConfig", "MixKABRNForCausalLM", "MixKABRNModel", "MixKABRNPreTrainedModel"]
