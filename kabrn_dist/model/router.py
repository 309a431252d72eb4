"""The router: which experts a token visits, with what weights, and what keeps the experts balanced.

Everything is in fp32 (or wider) and a function of the token, its place and the step, so that every rank of any layout
chooses alike.

Shapes: B batch, T time, D width, N = B·T tokens, E routed experts, k experts a token visits, L mixtures of the model.
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


@dataclass
class RouterStates:
    """What the routers of all layers carry from step to step; not trained by gradient, never cast.

    Attributes:
        bias: [L,E] fp32, added to the scores where experts are chosen, and only there.
        share: [L,E] fp32, of the last step's copies over all ranks; rows sum to 1.
        step: optimizer steps done, which the jitter's noise depends on.
    """

    bias: Tensor
    prev_load: Tensor
    step: int = 0

    @classmethod
    def initial(cls, layers: int, experts: int, device: torch.device | str) -> RouterStates:
        """No bias, and a last step that was perfectly even."""
        even = torch.full((layers, experts), 1 / experts, device=device)
        return cls(torch.zeros_like(even), even)

    def named(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds, by their names there; writing into them changes the model."""
        return {"router/bias": self.bias, "router/share": self.prev_load} if len(self.bias) else {}

    def update(self, load: Tensor, rate: float) -> None:
        """After an optimizer step: remember its load, and move each bias by `rate` towards a fair one, in place.

        Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1), with the mean taken out, which changes no
        choice and keeps the bias from drifting.

        Args:
            load: [L,E] copies for each expert in the whole step, over all ranks and micro-batches.
        """
        load = load.to(self.bias)
        mean = load.mean(1, keepdim=True)
        self.prev_load.copy_(load / (load.sum(1, keepdim=True).clamp(min=1)))
        self.bias += rate * (mean - load).sign()
        self.bias -= self.bias.mean(1, keepdim=True)
        self.step += 1


class RouterStats(NamedTuple):
    """What a router says of its tokens, as sums over them, so that batches can be added up in any split.

    Attributes:
        balance: scalar, Σ over sequences of the sequence-wise balance loss. Differentiable.
        global_balance: scalar, Σ over tokens of the global-batch balance loss. Differentiable.
        z: scalar, Σ over tokens of logsumexp(logits)². Differentiable.
        load: [E] copies that chose each expert, dropped ones included.
        entropy: scalar, Σ over tokens of the entropy of the scores, in nats.
        dropped: scalar, copies beyond the experts' capacity.
    """

    balance: Tensor
    global_balance: Tensor
    z: Tensor
    tokens_per_expert: Tensor
    entropy: Tensor
    dropped: Tensor


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        choice: [N,k] int64; E marks a copy that was dropped. weights: [N,k] fp32.
        logits, shares: [B,T,E]; shares are the scores divided by their sum.
        sent: [B,T,E] 1 where a token chose an expert.
        share: [E] of the last step's copies.
    """

    expert_ids: Tensor
    weights: Tensor
    logits: Tensor
    probs: Tensor
    assignment: Tensor
    prev_load: Tensor


class TokenCoordinates(NamedTuple):
    """What the jitter's noise depends on, the same for a token in every layout: int64 [B,T] each."""

    tokens: Tensor
    documents: Tensor
    positions: Tensor


class Router(nn.Module):
    """Scores of all experts and the k best.

    Args:
        sequence_group: the ranks that hold slices of the same sequences; None when they are whole.
        forced: deal tokens out evenly, whatever their scores; for benchmarks, and out of any configuration's reach.
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
        self.key = noise_key(seed, name)
        self.weight.data.copy_(draw_normal(seed, f"{name}.weight", tuple(self.weight.shape), 0.02))

    def forward(
        self, x: Tensor, bias: Tensor, share: Tensor, step: int = 0, places: TokenCoordinates | None = None
    ) -> Routing:
        """[B,T,D] normalised, and this layer's rows of the states → where its tokens go.

        Args:
            places: needed for jitter in training only.
        """
        wide = to_fp32(x)
        if self.training and self.router_config.jitter_eps and places is not None:
            wide = wide * self._jitter(x.shape[-1], step, places)
        logits = F.linear(wide, to_fp32(self.weight))
        scores = logits.sigmoid() if self.router_config.score_func == "sigmoid" else logits.softmax(-1)
        with torch.no_grad():
            choice = self._deal(scores) if self.force_load_balance else self._choose(scores + bias)
        chosen = scores.gather(-1, choice)
        if self.router_config.norm_topk_prob:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        sent = torch.zeros_like(scores).scatter_(-1, choice, 1.0).detach()
        if self.training and self.experts_config.capacity_factor is not None:
            choice = self._drop(choice, sent)
        shares = scores / scores.sum(-1, keepdim=True) if self.router_config.score_func == "sigmoid" else scores
        return Routing(choice.flatten(0, 1), chosen.flatten(0, 1), logits, shares, sent, share)

    def summarize(self, routing: Routing) -> RouterStats:
        """The sums of what was routed; apart, so that it can run while the copies travel.

        Balance, sequence-wise: DeepSeek-V3 (arXiv 2412.19437, eq. 17–20), so no split of the batch changes it. Global
        batch: arXiv 2501.11873, with the frequencies of the last step, which every rank knows exactly before the first
        micro-batch; those of the running step would depend on the split. z: ST-MoE (arXiv 2202.08906, eq. 5).
        """
        shares, sent, experts, k = (
            routing.probs,
            routing.assignment,
            self.experts_config.num_experts,
            self.experts_config.top_k,
        )
        balance = (self._frequency(sent) * (experts / k) * shares.sum(1)).sum()
        global_balance = (routing.prev_load.to(shares) * experts * shares.sum((0, 1))).sum()
        z = routing.logits.logsumexp(-1).square().sum()
        entropy = -torch.special.xlogy(shares.detach(), shares.detach()).sum()
        dropped = (routing.expert_ids == experts).sum().to(z.dtype)
        return RouterStats(balance, global_balance, z, sent.sum((0, 1)), entropy, dropped)

    def _choose(self, scores: Tensor) -> Tensor:
        """[B,T,E] biased scores → [B,T,k]; ties go to the lowest number, on every device and in every run."""
        groups, most, k = self.router_config.n_group, self.router_config.topk_group, self.experts_config.top_k
        if most is not None and most < groups:
            grouped = scores.unflatten(-1, (groups, -1))
            # DeepSeek-V3 rates a group by its k / M best experts.
            best = min(max(1, k // most), grouped.shape[-1])
            rating = grouped.topk(best, -1).values.sum(-1)
            kept = torch.zeros_like(rating, dtype=torch.bool).scatter_(-1, stable_topk(rating, most), True)
            scores = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        return stable_topk(scores, k)

    def _deal(self, scores: Tensor) -> Tensor:
        """Token n visits experts n·k … n·k + k − 1, modulo E."""
        batch, time, experts = scores.shape
        copies = torch.arange(batch * time * self.experts_config.top_k, device=scores.device) % experts
        return copies.view(batch, time, -1)

    def _jitter(self, width: int, step: int, places: TokenCoordinates) -> Tensor:
        """[B,T,D] factors between 1 − jitter and 1 + jitter (Switch Transformer, arXiv 2101.03961, appendix)."""
        salt = torch.tensor([step, self.key], device=places.tokens.device)
        channels = torch.arange(width, device=places.tokens.device)
        tokens = hash_combine(*places, *salt)
        return 1 + self.router_config.jitter_eps * (2 * hash_uniform(tokens.unsqueeze(-1), channels) - 1)

    def _drop(self, choice: Tensor, sent: Tensor) -> Tensor:
        """Replace by E the copies that an expert's capacity has no room for, the latest of each sequence first.

        A capacity of each sequence drops the same copies however sequences are spread; GShard's (arXiv 2006.16668),
        of a rank's tokens, would not.
        """
        before, whole = torch.zeros_like(sent[:, :1]), sent.shape[1]
        if self.sequence_group is not None:
            slices = dist.get_world_size(self.sequence_group)
            counts = sent.sum(1)
            everyone = [torch.empty_like(counts) for _ in range(slices)]
            dist.all_gather(everyone, counts, group=self.sequence_group)
            for earlier in everyone[: dist.get_rank(self.sequence_group)]:
                before = before + earlier.unsqueeze(1)
            whole *= slices
        room = expert_capacity(self.experts_config, whole)
        place = (sent.cumsum(1) + before).gather(-1, choice)
        return choice.masked_fill(place > room, self.experts_config.num_experts)

    def _frequency(self, sent: Tensor) -> Tensor:
        """[B,T,E] copies sent → [B,E] of whole sequences, divided by the square of their length.

        The loss is linear in the scores, so slices need each other's counts only, and no gradient travels.
        """
        counts, length = sent.sum(1), sent.shape[1]
        if self.sequence_group is not None:
            dist.all_reduce(counts, group=self.sequence_group)
            length *= dist.get_world_size(self.sequence_group)
        return counts / length**2


def expert_capacity(experts: ExpertsConfig, tokens: int) -> int:
    """Copies that an expert takes of one sequence of `tokens` tokens."""
    assert experts.capacity_factor is not None
    return max(1, -int(-experts.capacity_factor * tokens * experts.top_k // experts.num_experts))


def stable_topk(scores: Tensor, count: int) -> Tensor:
    """Indices [..., count] of the largest along the last dimension, best first, ties by the lower index.

    `topk` breaks ties as it likes; `max` returns the first, and few rounds of it are faster than a stable sort.
    """
    left, rounds = scores.clone(), []
    for _ in range(count):
        best = left.max(-1, keepdim=True).indices
        rounds.append(best)
        left.scatter_(-1, best, -torch.inf)
    return torch.cat(rounds, -1)


def stable_topk_naive(scores: Tensor, count: int) -> Tensor:
    """`first_best` by a stable sort of everything."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
