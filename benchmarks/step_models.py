"""What `benchmarks/step.py` times: whole training steps of MixKABRN and of two Transformers of equal active parameters.

All train on the same random tokens with AdamW and clipped gradients. Each is a `Trainee`: built, stepped and forgotten.

- ours: the project's own engine, as `mixkabrn train` runs it, with ternary matrices and rational experts.
- dense: the plain Transformer of `benchmarks/quality_models.py` in torch alone: scaled_dot_product_attention, fused
  AdamW, and autocast for bf16.
- Mixtral: Hugging Face's, with the experts' hidden size that gives as many active parameters; its total follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality_models import Transformer
from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.losses import StepTotals
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import make_mesh
from kabrn_dist.model.mixkabrn import build_model
from kabrn_dist.planner.count import ParameterCounts, count_parameters

VOCABULARY, HEAD_DIM, RATE, CLIP = 4096, 64, 1e-4, 1.0
# Different ones, as in training: experts get another number of tokens in every step.
BATCHES = 16


@dataclass(frozen=True)
class Case:
    """One shape of model and batch.

    Attributes:
        width: hidden size; a head has 64 channels of it.
        layers: all of retention in ours.
        context: tokens of a row.
        rows: of the batch, over all processes.
        experts: routed experts of a layer.
        top_k: routed experts that a token visits.
        precision: "fp32" or "bf16".
    """

    width: int
    layers: int
    context: int
    rows: int
    experts: int
    top_k: int
    precision: str

    def __str__(self) -> str:
        return (
            f"{self.width} × {self.layers}, {self.context} × {self.rows}, "
            f"top-{self.top_k} of {self.experts}, {self.precision}"
        )

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.context * self.rows

    @property
    def expert_hidden_size(self) -> int:
        """Hidden size of one of ours: with the shared one, as many channels are active as in a feed-forward of 4."""
        return max(16, 4 * self.width // (self.top_k + 1) // 16 * 16)

    def configure(self, world: int = 1) -> Config:
        """Return the configuration of our model; several processes share its experts and the rows of the batch."""
        return Config.model_validate(
            {
                "run": {"folder": "runs/bench-step"},
                "data": {"path": "unused", "sequence_length": self.context},
                "model": {
                    "vocab_size": VOCABULARY,
                    "hidden_size": self.width,
                    "layers": "R" * self.layers,
                    "short_conv_size": 4,
                    "retention": {
                        "num_heads": self.width // HEAD_DIM,
                        "key_dim": HEAD_DIM,
                        "value_dim": HEAD_DIM,
                        "decay": [1.5, 9],
                    },
                    "experts": {
                        "type": "rational",
                        "num_experts": self.experts,
                        "num_shared_experts": 1,
                        "top_k": self.top_k,
                        "expert_hidden_size": self.expert_hidden_size,
                        "function_groups": 4,
                    },
                },
                "parallel": {"zero_stage": 1, "expert_parallel": world},
                "optimizer": {"learning_rate": RATE},
                "training": {
                    "steps": 1 << 20,
                    "global_batch_size": self.rows,
                    "micro_batch_size": self.rows // world,
                    "precision": self.precision,
                },
            }
        )

    def count(self) -> ParameterCounts:
        """Return the numbers of our model's parameters."""
        return count_parameters(self.configure().model)


class Trainee(Protocol):
    """A model in training.

    Attributes:
        active: parameters that a token passes through.
        total: all parameters.
    """

    active: int
    total: int

    def forward_backward(self) -> None:
        """Compute the gradients of one batch."""

    def update(self) -> None:
        """Clip the gradients and update the weights."""


class Ours:
    """The project's model under its own engine; a process group must be there, and its ranks share the experts."""

    def __init__(self, case: Case) -> None:
        place, counts = read_launch_env(), case.count()
        config = case.configure(place.world_size)
        self.active, self.total = counts.active, counts.total
        self.totals = StepTotals(case.tokens, case.tokens, case.rows, ranks=place.world_size)
        mesh = make_mesh(place, torch.device("cpu"), expert_parallel=place.world_size, sequence_parallel=1)
        self.engine = Engine(build_model(config, mesh), config, mesh)
        self.batches = itertools.cycle(make_batch(*drawn) for drawn in draw_tokens(case))

    def forward_backward(self) -> None:
        """Compute the gradients of one batch."""
        self.engine.forward_backward(next(self.batches), self.totals)

    def update(self) -> None:
        """Clip the gradients and update the weights."""
        self.engine.optimizer_step(RATE, 0.1)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules of the model by what they are."""
        blocks: list[Any] = list(self.engine.model.blocks)
        return {
            "embedding": [self.engine.model.embedding],
            "mixer": [block.mixer for block in blocks],
            "convolution": [block.convolution for block in blocks],
            "mixture": [block.mixture for block in blocks],
            "experts": [experts for block in blocks for experts in (block.mixture.routed, block.mixture.shared)],
            "router": [block.mixture.router for block in blocks],
            "head": [self.engine.model.head],
        }


class TorchTrainee:
    """A model in torch alone, with fused AdamW over fp32 weights, and autocast for bf16.

    Args:
        model: its parameters are trained.
        loss: the mean cross-entropy of a batch.
        case: says the precision.
        active: parameters that a token passes through.
    """

    def __init__(self, model: nn.Module, loss: Any, case: Case, active: int) -> None:
        self.loss, self.active = loss, active
        self.total = sum(p.numel() for p in model.parameters())
        self.model = nn.parallel.DistributedDataParallel(model) if read_launch_env().world_size > 1 else model
        self.half = case.precision == "bf16"
        self.batches = itertools.cycle(draw_tokens(case))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, fused=True)

    def forward_backward(self) -> None:
        """Compute the gradients of one batch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = self.loss(self.model, *next(self.batches))
        loss.backward()

    def update(self) -> None:
        """Clip the gradients and update the weights."""
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make_dense(case: Case) -> TorchTrainee:
    """Return a dense Transformer with as many active parameters as ours."""
    return _make_dense(case, case.count().active, lambda model: model.measure().active)


def make_large_dense(case: Case) -> TorchTrainee:
    """Return a dense Transformer with as many parameters in all as ours, of which memory is asked."""
    return _make_dense(case, case.count().total, lambda model: model.measure().total)


def _make_dense(case: Case, wanted: int, measure: Callable[[Transformer], int]) -> TorchTrainee:
    def build(hidden: int) -> Transformer:
        return Transformer(VOCABULARY, case.width, case.layers, case.width // HEAD_DIM, hidden, gated=True)

    with torch.device("meta"):
        least = measure(build(1))
    model = build(1 + round((wanted - least) / (3 * case.width * case.layers)))
    return TorchTrainee(model, _dense_loss, case, model.measure().active)


def make_mixtral(case: Case) -> TorchTrainee | str:
    """Return Hugging Face's Mixtral with as many active parameters as ours, or why there is none."""
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError as error:
        return f"missing: {error}"

    def settings(hidden: int) -> Any:
        heads = case.width // HEAD_DIM
        return MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=case.width,
            intermediate_size=hidden,
            num_hidden_layers=case.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            num_local_experts=case.experts,
            num_experts_per_tok=case.top_k,
            max_position_embeddings=case.context,
            attn_implementation="sdpa",
            use_cache=False,
        )

    per_channel = 3 * case.width * case.layers
    with torch.device("meta"):
        least = sum(p.numel() for p in MixtralForCausalLM(settings(1)).parameters())
    # Of the experts that a token does not visit and of the embedding, one row.
    least -= per_channel * (case.experts - case.top_k) + (VOCABULARY - 1) * case.width
    # torch's grouped products want strides of whole 16 bytes.
    hidden = 16 * max(1, round((case.count().active - least) / (16 * per_channel * case.top_k)))
    model = MixtralForCausalLM(settings(hidden))
    return TorchTrainee(model, _mixtral_loss, case, least + per_channel * case.top_k * (hidden - 1))


MODELS: dict[str, Callable[[Case], Trainee | str]] = {
    "ours": Ours,
    "dense": make_dense,
    "Mixtral": make_mixtral,
    "dense of as many parameters in all": make_large_dense,
}


def draw_tokens(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Return this process's tokens and targets [B,T] of several batches, the same for every trainee."""
    place = read_launch_env()
    generator = torch.Generator().manual_seed(place.rank)
    shape = BATCHES, case.rows // place.world_size, case.context + 1
    # Unlike frequencies, as words have: experts' loads are unlike too.
    drawn = (torch.rand(shape, generator=generator) ** 3 * VOCABULARY).long()
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in drawn]


def make_batch(tokens: Tensor, targets: Tensor) -> Batch:
    """Return a batch of rows that each hold one document."""
    documents = torch.zeros_like(tokens)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    return Batch(tokens, targets, documents, positions, documents[:, 0])


def _dense_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())


def _mixtral_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1).float(), targets.flatten())
