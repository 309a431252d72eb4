"""The router: which experts a token visits, with what weights, and what keeps the experts balanced.

Everything is in fp32 or wider, and a function of the token, its coordinates and the step, so that every rank of any
layout chooses alike.

Shapes:
    B: batch.
    T: tokens of a sequence.
    D: hidden size.
    N: B·T tokens.
    E: routed experts.
    k: experts that a token visits.
    L: layers that hold a mixture of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kabrn_dist.config import ExpertsConfig, ModelConfig
from kabrn_dist.model.init import draw_normal
from kabrn_dist.ops.activation_quant import to_fp32
from kabrn_dist.ops.counter_rng import hash_combine, hash_uniform, noise_key
from kabrn_dist.ops.low_rank import LowRankModule, add_low_rank


@dataclass
class RouterStates:
    """State that the routers of all layers carry from step to step; not trained by gradient, never cast.

    Attributes:
        bias: [L,E] fp32, added to the scores where experts are chosen, and only there.
        prev_load: [L,E] fp32, each expert's fraction of the last step's routed tokens, over all ranks; rows sum to 1.
        step: optimizer steps done, which the jitter's noise depends on.
    """

    bias: Tensor
    prev_load: Tensor
    step: int = 0

    @classmethod
    def initial(cls, layers: int, experts: int, device: torch.device | str) -> RouterStates:
        """Return the states of a new model: no bias, and a last step that was perfectly balanced."""
        even = torch.full((layers, experts), 1 / experts, device=device)
        return cls(torch.zeros_like(even), even)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds, by their names there; writing into them changes the model."""
        return {"router/bias": self.bias, "router/share": self.prev_load} if len(self.bias) else {}

    def update(self, load: Tensor, rate: float) -> None:
        """Record the load of an optimizer step, and move each bias by `rate` towards balance, in place.

        Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1), less the mean over experts: subtracting it
        changes no choice and keeps the bias from drifting.

        Args:
            load: [L,E] routed tokens of each expert in the whole step, over all ranks and micro-batches.
            rate: `router.bias_update_rate`.
        """
        load = load.to(self.bias)
        mean = load.mean(1, keepdim=True)
        self.prev_load.copy_(load / (load.sum(1, keepdim=True).clamp(min=1)))
        self.bias += rate * (mean - load).sign()
        self.bias -= self.bias.mean(1, keepdim=True)
        self.step += 1


class RouterStats(NamedTuple):
    """Statistics of a router as sums over its tokens, so that batches add up in any split.

    Attributes:
        balance: scalar, Σ over sequences of the sequence-wise balance loss. Differentiable.
        global_balance: scalar, Σ over tokens of the global-batch balance loss. Differentiable.
        z: scalar, Σ over tokens of logsumexp(logits)². Differentiable.
        tokens_per_expert: [E] routed tokens that chose each expert, dropped ones included.
        entropy: scalar, Σ over tokens of the entropy of the scores, in nats.
        dropped: scalar, routed tokens beyond the experts' capacity.
    """

    balance: Tensor
    global_balance: Tensor
    z: Tensor
    tokens_per_expert: Tensor
    entropy: Tensor
    dropped: Tensor


class Routing(NamedTuple):
    """Which experts each token visits, and what the losses need to know about the choice.

    Attributes:
        expert_ids: [N,k] int64; E marks a token that the chosen expert has no capacity for.
        weights: [N,k] fp32, of the experts' outputs.
        logits: [B,T,E].
        probs: [B,T,E], the scores divided by their sum.
        assignment: [B,T,E], 1 where a token chose an expert, else 0.
        prev_load: [E], each expert's fraction of the last step's routed tokens.
    """

    expert_ids: Tensor
    weights: Tensor
    logits: Tensor
    probs: Tensor
    assignment: Tensor
    prev_load: Tensor


class TokenCoordinates(NamedTuple):
    """Coordinates of the tokens that the jitter's noise depends on, the same for a token in every layout.

    Attributes:
        tokens: [B,T] int64, ids in the vocabulary.
        documents: [B,T] int64.
        positions: [B,T] int64, within documents.
    """

    tokens: Tensor
    documents: Tensor
    positions: Tensor


class Router(LowRankModule):
    """Scores all experts for each token and chooses the k best.

    Args:
        hidden_size: D.
        config: of the model.
        sequence_group: the ranks that hold slices of the same sequences; None if sequences are whole.
        force_load_balance: assign tokens evenly, whatever their scores; for benchmarks, no configuration sets it.

    Attributes:
        weight: [E,D].
    """

    def __init__(
        self,
        hidden_size: int,
        config: ModelConfig,
        sequence_group: dist.ProcessGroup | None = None,
        force_load_balance: bool = False,
    ) -> None:
        super().__init__()
        self.experts_config, self.router_config = config.experts, config.router
        self.sequence_group, self.force_load_balance = sequence_group, force_load_balance
        self.key = 0
        self.weight = nn.Parameter(torch.empty(self.experts_config.num_experts, hidden_size))

    def initialize(self, seed: int, name: str) -> None:
        """Draw the weights, and the key of the jitter's noise, from `seed` and the module's `name`."""
        self.key = noise_key(seed, name)
        self.weight.data.copy_(draw_normal(seed, f"{name}.weight", tuple(self.weight.shape), 0.02))

    def forward(
        self, x: Tensor, bias: Tensor, prev_load: Tensor, step: int = 0, coordinates: TokenCoordinates | None = None
    ) -> Routing:
        """Choose each token's experts. Collective over the sequence group if a capacity is set in training.

        Args:
            x: [B,T,D], normalized.
            bias: [E], this layer's row of the states.
            prev_load: [E], this layer's row of the states.
            step: optimizer steps done.
            coordinates: of the tokens; only needed for jitter in training.
        """
        x = to_fp32(x)
        if self.training and self.router_config.jitter_eps and coordinates is not None:
            x = x * self._jitter(x.shape[-1], step, coordinates)
        logits, scores = self._score(x, exact=coordinates is None and not self.training)
        with torch.no_grad():
            expert_ids = self._assign_evenly(scores) if self.force_load_balance else self._choose(scores + bias)
        weights = scores.gather(-1, expert_ids)
        if self.router_config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        assignment = torch.zeros_like(scores).scatter_(-1, expert_ids, 1.0).detach()
        if self.training and self.experts_config.capacity_factor is not None:
            expert_ids = self._drop(expert_ids, assignment)
        probs = scores / scores.sum(-1, keepdim=True) if self.router_config.score_func == "sigmoid" else scores
        return Routing(expert_ids.flatten(0, 1), weights.flatten(0, 1), logits, probs, assignment, prev_load)

    def _score(self, x: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        """Return logits and scores [B,T,E]; rounded from fp64 if `exact`, so that no order of a sum shows in them."""
        weight = to_fp32(self.weight)
        inputs, weight = (x.double(), weight.double()) if exact else (x, weight)
        logits = add_low_rank(F.linear(inputs, weight), inputs, self.low_rank("weight"))
        scores = logits.sigmoid() if self.router_config.score_func == "sigmoid" else logits.softmax(-1)
        return logits.to(x.dtype), scores.to(x.dtype)

    def summarize(self, routing: Routing) -> RouterStats:
        """Return the sums of a routing; a separate call, so that it can run while tokens travel.

        The sequence-wise balance loss is that of DeepSeek-V3 (arXiv 2412.19437, eq. 17–20), so no split of the batch
        changes it. The global-batch loss (arXiv 2501.11873) uses the frequencies of the last step, which every rank
        knows exactly before the first micro-batch; those of the running step would depend on the split. The z-loss is
        that of ST-MoE (arXiv 2202.08906, eq. 5). Collective over the sequence group.
        """
        probs, assignment = routing.probs, routing.assignment
        experts, k = self.experts_config.num_experts, self.experts_config.top_k
        balance = (self._frequency(assignment) * (experts / k) * probs.sum(1)).sum()
        global_balance = (routing.prev_load.to(probs) * experts * probs.sum((0, 1))).sum()
        z = routing.logits.logsumexp(-1).square().sum()
        entropy = -torch.special.xlogy(probs.detach(), probs.detach()).sum()
        dropped = (routing.expert_ids == experts).sum().to(z.dtype)
        return RouterStats(balance, global_balance, z, assignment.sum((0, 1)), entropy, dropped)

    def _choose(self, scores: Tensor) -> Tensor:
        """[B,T,E] biased scores → [B,T,k]; ties go to the lowest number, on every device and in every run."""
        groups, top_groups, k = self.router_config.n_group, self.router_config.topk_group, self.experts_config.top_k
        if top_groups is not None and top_groups < groups:
            grouped = scores.unflatten(-1, (groups, -1))
            # DeepSeek-V3 rates a group by its k / M best experts.
            best = min(max(1, k // top_groups), grouped.shape[-1])
            rating = grouped.topk(best, -1).values.sum(-1)
            allowed = torch.zeros_like(rating, dtype=torch.bool).scatter_(-1, stable_topk(rating, top_groups), True)
            scores = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
        return stable_topk(scores, k)

    def _assign_evenly(self, scores: Tensor) -> Tensor:
        """Token n visits experts n·k … n·k + k − 1, modulo E."""
        batch, time, experts = scores.shape
        expert_ids = torch.arange(batch * time * self.experts_config.top_k, device=scores.device) % experts
        return expert_ids.view(batch, time, -1)

    def _jitter(self, hidden_size: int, step: int, coordinates: TokenCoordinates) -> Tensor:
        """[B,T,D] factors between 1 − jitter and 1 + jitter (Switch Transformer, arXiv 2101.03961, appendix)."""
        salt = torch.tensor([step, self.key], device=coordinates.tokens.device)
        channels = torch.arange(hidden_size, device=coordinates.tokens.device)
        tokens = hash_combine(*coordinates, *salt)
        return 1 + self.router_config.jitter_eps * (2 * hash_uniform(tokens.unsqueeze(-1), channels) - 1)

    def _drop(self, expert_ids: Tensor, assignment: Tensor) -> Tensor:
        """Replace by E the choices beyond an expert's capacity, the latest of each sequence first.

        A capacity per sequence drops the same tokens however sequences are spread over ranks; GShard's (arXiv
        2006.16668), per rank, would not.
        """
        before, length = torch.zeros_like(assignment[:, :1]), assignment.shape[1]
        if self.sequence_group is not None:
            slices = dist.get_world_size(self.sequence_group)
            tokens_per_expert = assignment.sum(1)
            gathered = [torch.empty_like(tokens_per_expert) for _ in range(slices)]
            dist.all_gather(gathered, tokens_per_expert, group=self.sequence_group)
            for earlier in gathered[: dist.get_rank(self.sequence_group)]:
                before = before + earlier.unsqueeze(1)
            length *= slices
        capacity = expert_capacity(self.experts_config, length)
        rank = (assignment.cumsum(1) + before).gather(-1, expert_ids)
        return expert_ids.masked_fill(rank > capacity, self.experts_config.num_experts)

    def _frequency(self, assignment: Tensor) -> Tensor:
        """[B,T,E] assignments → [B,E] tokens per expert of whole sequences, over the square of their length.

        The loss is linear in the scores, so slices only need each other's counts, and no gradient travels.
        """
        tokens_per_expert, length = assignment.sum(1), assignment.shape[1]
        if self.sequence_group is not None:
            dist.all_reduce(tokens_per_expert, group=self.sequence_group)
            length *= dist.get_world_size(self.sequence_group)
        return tokens_per_expert / length**2


def expert_capacity(experts: ExpertsConfig, tokens: int) -> int:
    """Return how many tokens an expert takes of one sequence of `tokens` tokens."""
    assert experts.capacity_factor is not None
    return max(1, -int(-experts.capacity_factor * tokens * experts.top_k // experts.num_experts))


def stable_topk(scores: Tensor, count: int) -> Tensor:
    """Return the indices [..., count] of the largest along the last dimension, best first, ties by the lower index.

    `torch.topk` breaks ties arbitrarily; `max` returns the first, and a few rounds of it are faster than a stable sort.
    """
    remaining, rounds = scores.clone(), []
    for _ in range(count):
        best = remaining.max(-1, keepdim=True).indices
        rounds.append(best)
        remaining.scatter_(-1, best, -torch.inf)
    return torch.cat(rounds, -1)


def stable_topk_naive(scores: Tensor, count: int) -> Tensor:
    """Compute `stable_topk` by a stable sort of all scores."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
