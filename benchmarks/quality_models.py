"""What learns in `benchmarks/quality.py`: MixKABRN under the project's own engine, and a dense Transformer beside it.

Both take the same batches and the same schedule; neither knows the other.

Shapes: B rows, T tokens of a row, D width, H heads, C vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.losses import StepTotals
from kabrn_dist.config import Config, ModelConfig, OptimizerConfig
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import make_mesh
from kabrn_dist.model.mixkabrn import build_model
from kabrn_dist.planner.count import count_parameters
from kabrn_dist.train.schedule import learning_rate, weight_decay


class Size(NamedTuple):
    """Parameters of a model: all, those a token passes through, and the bytes that its weights take.

    A ternary weight takes 2 bits, any other 2 bytes.
    """

    total: int
    active: int
    bytes: float


class Learner(ABC):
    """A model in training."""

    @abstractmethod
    def learn(self, batch: Batch, step: int) -> float:
        """Take one optimizer step, 0 is the first; the loss before it in nats a character."""

    @abstractmethod
    def score(self, batch: Batch) -> float:
        """Σ over targets of the cross-entropy in nats."""

    @abstractmethod
    def close(self) -> None:
        """Free what is not freed by forgetting the learner."""


class Ours(Learner):
    """The real model under the real engine, in this process alone; a process group must be there."""

    def __init__(self, config: Config) -> None:
        place = read_launch_env()
        mesh = make_mesh(place, torch.device("cpu"), expert_parallel=1, sequence_parallel=1)
        self.config = config
        self.engine = Engine(build_model(config, mesh), config, mesh)

    def learn(self, batch: Batch, step: int) -> float:
        """Take one optimizer step."""
        rows, tokens = batch.tokens.shape[0], batch.tokens.numel()
        losses, _ = self.engine.forward_backward(batch, StepTotals(tokens, tokens, rows, ranks=1))
        steps, settings = self.config.training.steps, self.config.optimizer
        self.engine.optimizer_step(learning_rate(step, steps, settings), weight_decay(step, steps, settings))
        return float(losses.language)

    def score(self, batch: Batch) -> float:
        """Return the sum of the cross-entropy in nats."""
        return float(self.engine.evaluate(batch).language)

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()


def measure_ours(model: ModelConfig) -> Size:
    """Return the size of a model of this project."""
    counts = count_parameters(model)
    return Size(counts.total, counts.active, counts.ternary / 4 + 2 * (counts.total - counts.ternary))


class Rival(Learner):
    """A dense Transformer in fp32, trained with torch alone."""

    def __init__(self, model: Transformer, settings: OptimizerConfig, steps: int) -> None:
        self.model, self.settings, self.steps = model, settings, steps
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )

    def learn(self, batch: Batch, step: int) -> float:
        """Take one optimizer step."""
        loss = F.cross_entropy(self.model(batch.tokens).flatten(0, 1), batch.targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.settings)
            group["weight_decay"] = weight_decay(step, self.steps, self.settings)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def score(self, batch: Batch) -> float:
        """Return the sum of the cross-entropy in nats."""
        return float(F.cross_entropy(self.model(batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="sum"))

    def close(self) -> None:
        """There is nothing."""


class Transformer(nn.Module):
    """Rotary positions, RMSNorm before each part, query-key norm, SwiGLU; like the published recipes, without biases.

    Args:
        hidden: of the feed-forward.
        gated: a SiLU gate on the heads' results, as retention has one (gated attention, arXiv 2505.06708).
        taps: tokens that a convolution like ours sees in front of attention and feed-forward; 0: none.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, hidden: int, gated: bool, taps: int = 0
    ) -> None:
        super().__init__()
        self.key_width = width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Layer(width, heads, hidden, gated, layers, taps) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        for table in (self.embedding, self.head):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,T] → logits [B,T,C]."""
        x = self.embedding(tokens)
        angles = rotary_angles(tokens.shape[1], self.key_width)
        for block in self.blocks:
            x = block(x, *angles)
        return self.head(rms(x))

    def measure(self) -> Size:
        """Return the size of this model."""
        total = sum(p.numel() for p in self.parameters())
        # The embedding is a look-up of one row.
        return Size(total, total - self.embedding.weight.numel() + self.embedding.embedding_dim, 2.0 * total)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int, gated: bool, layers: int, taps: int) -> None:
        super().__init__()
        self.taps = nn.ParameterList(nn.Parameter(torch.zeros(taps, width)) for _ in range(2 if taps else 0))
        self.heads, self.gated = heads, gated
        self.inputs = nn.Linear(width, (3 + gated) * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        for matrix in (self.inputs, self.up, self.out, self.down):
            # Each layer adds two terms to the stream; their sum should not grow with depth.
            gain = 1 / math.sqrt(2 * layers) if matrix in (self.out, self.down) else 1.0
            nn.init.normal_(matrix.weight, std=gain / math.sqrt(matrix.in_features))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B,T,D] → [B,T,D]."""
        q, k, v, *gate = self.inputs(rms(self._convolve(x, 0))).chunk(3 + self.gated, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        q, k = (rms(rotate(part, cos, sin)) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        if gate:
            mixed = mixed * F.silu(gate[0])
        x = x + self.out(rms(mixed) if gate else mixed)
        left, right = self.up(rms(self._convolve(x, 1))).chunk(2, -1)
        return x + self.down(F.silu(left) * right)

    def _convolve(self, x: Tensor, place: int) -> Tensor:
        if not self.taps:
            return x
        weight = self.taps[place]
        return x + sum(weight[j] * F.pad(x, (0, 0, j + 1, 0))[:, : x.shape[1]] for j in range(len(weight)))


def rms(x: Tensor) -> Tensor:
    """Return x over its root mean square, without a gain."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotary_angles(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T,K/2] of each position (RoFormer, arXiv 2104.09864)."""
    speeds = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * speeds
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rotated queries or keys [B,H,T,K]."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)
