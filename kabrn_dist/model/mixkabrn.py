"""The model: embed → N × [x + Mixer(x); x + MixtureOfKANs(x)] → norm → head. A mixer is retention or attention.

Shapes:
    B: batch.
    T: tokens of a sequence.
    D: hidden size.
    C: vocabulary size.
    E: routed experts.
    L: layers that hold a mixture of experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kabrn_dist.config import Config, ModelConfig, ParallelConfig
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.all_to_all import ExpertLink, Traffic
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.distributed.state_scan import SequenceLink
from kabrn_dist.model.attention import Attention
from kabrn_dist.model.block import Block
from kabrn_dist.model.init import draw_normal
from kabrn_dist.model.mixer import Mixer, make_position_info
from kabrn_dist.model.moe import DenseFeedForward, MixtureOfExperts, RouterInputs
from kabrn_dist.model.parameters import ParameterInfo, TernaryWeight, build_parameter_table
from kabrn_dist.model.retention import Retention
from kabrn_dist.model.router import RouterStates, RouterStats, TokenCoordinates
from kabrn_dist.ops.activation_quant import rms_norm
from kabrn_dist.ops.cross_entropy import cross_entropy
from kabrn_dist.ops.low_rank import LowRankModule, add_low_rank
from kabrn_dist.ops.plain_product import plain_product
from kabrn_dist.ops.retention import log_decays
from kabrn_dist.ops.weight_quant import QuantState


class BatchStats(NamedTuple):
    """Sums over the tokens of one forward pass. Those of batches and ranks add up, but for `rows`.

    Attributes:
        language: scalar fp32, Σ over targets of the cross-entropy in nats. Differentiable.
        balance: scalar, Σ over layers of the routers' sequence-wise balance loss. Differentiable.
        global_balance: scalar, Σ over layers of the routers' global-batch balance loss. Differentiable.
        z: scalar, Σ over layers of the routers' z-loss. Differentiable.
        tokens_per_expert: [L,E] routed tokens that chose each expert, dropped ones included.
        entropy: [L] Σ over tokens of the routers' entropy in nats.
        dropped: [L] routed tokens beyond the experts' capacity.
        rows: [B] the sum `language`, row by row. Not differentiable.
    """

    language: Tensor
    balance: Tensor
    global_balance: Tensor
    z: Tensor
    tokens_per_expert: Tensor
    entropy: Tensor
    dropped: Tensor
    rows: Tensor


class Head(nn.Linear, LowRankModule):
    """The last matrix, from hidden states to logits; plain, without a bias.

    Args:
        hidden_size: D.
        vocab_size: C.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [...,C] of hidden states [...,D]; see `plain_product` for their dtype."""
        return add_low_rank(plain_product(x, self.weight), x, self.low_rank("weight"))


class MixKABRN(nn.Module):
    """A Mixture of Kolmogorov-Arnold Bit Retentive Networks. Holds this rank's experts only.

    Args:
        config: the `model` section.
        placement: numbers of routed experts on each rank of the expert group.
        mesh: this process among the others.
        parallel: how states and routed tokens travel between ranks; the default is that of the configuration.

    Attributes:
        routers: state that the routers carry from step to step.
        traffic: bytes of each mixture's exchange, counted by this process.
        quant: how far all ternary modules are quantized; see `set_quantization`.
    """

    def __init__(
        self, config: ModelConfig, placement: ExpertPlacement, mesh: Mesh, parallel: ParallelConfig | None = None
    ) -> None:
        super().__init__()
        parallel = parallel or ParallelConfig()
        self.config, self.placement = config, placement
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.routers = RouterStates.initial(len(config.moe_layers), config.experts.num_experts, mesh.device)
        self.traffic = [Traffic() for _ in config.moe_layers]
        self.quant = QuantState(float(config.quantize), config.scale_group_size)
        self.blocks = nn.ModuleList(self._make_blocks(mesh, parallel))
        self.head = Head(config.hidden_size, config.vocab_size)

    def _make_blocks(self, mesh: Mesh, parallel: ParallelConfig) -> list[Block]:
        config, quant = self.config, self.quant if self.config.quantize else False
        # Each block adds two terms to the stream; this keeps the sum's variance from growing with depth.
        init_gain = 1 / math.sqrt(2 * len(config.layers))
        sequence_link = make_sequence_link(config, mesh, parallel)
        traffic = dict(zip(config.moe_layers, self.traffic, strict=True))
        blocks = []
        for layer, kind in enumerate(config.layers):
            size = config.hidden_size, config.retention, quant, init_gain
            mixer: Mixer
            if kind == "R":
                mixer = Retention(*size, sequence_link, config.short_conv_size)
            else:
                mixer = Attention(*size, mesh.sequence_group, config.short_conv_size)
            mixture: MixtureOfExperts | DenseFeedForward
            if layer in traffic:
                link = make_expert_link(config, self.placement, mesh, parallel, traffic[layer])
                mixture = MixtureOfExperts(config, init_gain, link, mesh.sequence_group, quant=quant)
            else:
                mixture = DenseFeedForward(config, init_gain, quant)
            blocks.append(Block(mixer, mixture, config))
        return blocks

    def initialize(self, seed: int) -> None:
        """Draw every logical tensor from `seed` and its name: the same for any world size and placement."""
        self.embedding.weight.data.copy_(draw_normal(seed, "embedding", tuple(self.embedding.weight.shape), 0.5))
        self.head.weight.data.copy_(draw_normal(seed, "head", tuple(self.head.weight.shape), 0.02))
        for name, module in self.blocks.named_modules():
            if hasattr(module, "initialize"):
                module.initialize(seed, f"blocks.{name}")

    def forward(self, batch: Batch) -> BatchStats:
        """Return the batch's sums. Every sequence starts with an empty state."""
        coordinates = TokenCoordinates(batch.tokens, batch.documents, batch.positions)
        x, _, routers = self._run_blocks(batch.tokens, batch.documents, batch.positions, None, coordinates)
        nats = cross_entropy(self.head(rms_norm(x)).flatten(0, 1), batch.targets.flatten())
        rows = nats.view_as(batch.targets).sum(1)
        stats = self._sum_router_stats(routers, like=rows)
        return BatchStats(
            language=rows.sum(),
            balance=stats.balance.sum(),
            global_balance=stats.global_balance.sum(),
            z=stats.z.sum(),
            tokens_per_expert=stats.tokens_per_expert,
            entropy=stats.entropy,
            dropped=stats.dropped,
            rows=rows.detach(),
        )

    def _sum_router_stats(self, routers: list[RouterStats], like: Tensor) -> RouterStats:
        """The layers' sums, stacked: [L] each, [L,E] for `tokens_per_expert`."""
        if routers:
            return RouterStats(*(torch.stack(parts) for parts in zip(*routers, strict=True)))
        none = like.new_zeros(0)
        return RouterStats(none, none, none, self.routers.bias.clone(), none, none)

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, documents: Tensor, positions: Tensor, states: list[Any] | None
    ) -> tuple[Tensor, list[Any]]:
        """Read tokens on top of the states of earlier calls.

        Args:
            tokens: [B,T] int64.
            documents: [B,T] int64, never falling along a row.
            positions: [B,T] int64, within documents.
            states: one per layer, of the first token's document; None where nothing has been read yet.

        Returns:
            The last token's logits [B,C] fp32, and one state per layer. The state of a retention is [B,H,K,V],
            whatever the length; that of an attention holds the keys and values so far. With a short convolution it
            also holds the last few inputs.
        """
        x, states, _ = self._run_blocks(tokens, documents, positions, states, None, in_order=True)
        return self.head(rms_norm(x[:, -1])).float(), states

    @torch.no_grad()
    def read(
        self, tokens: Tensor, documents: Tensor, positions: Tensor, states: list[Any] | None, in_order: bool = False
    ) -> tuple[Tensor, list[Any]]:
        """Read tokens as `decode` does, and return what the head reads.

        Args:
            tokens: see `decode`.
            documents: see `decode`.
            positions: see `decode`.
            states: see `decode`.
            in_order: whether sums are taken in the order of the runtime in C, as `decode` takes them on a CPU. If not,
                retention has its chunkwise form, which is faster; the sums' other rounding may move a value across a
                threshold of the int8 quantizer.

        Returns:
            The hidden states of all tokens, normalized, [B,T,D], and one state per layer.
        """
        x, states, _ = self._run_blocks(tokens, documents, positions, states, None, in_order)
        return rms_norm(x), states

    def set_quantization(self, lam: float) -> None:
        """Quantize all ternary modules by `lam`: 0 is plain, 1 ternary and int8, and between them a value is blended.

        Without effect on a model with `quantize: false`, whose modules stay plain.
        """
        self.quant.lam = lam

    def parameter_table(self) -> dict[str, ParameterInfo]:
        """Return name → role, layer and kind of every parameter, in the order of `named_parameters()`."""
        return build_parameter_table(self.blocks, self.head, self.config.quantize)

    def select_parameters(self, predicate: Callable[[ParameterInfo], bool]) -> list[nn.Parameter]:
        """Return the parameters whose `ParameterInfo` satisfies `predicate`, in the order of `named_parameters()`."""
        table = self.parameter_table()
        return [parameter for name, parameter in self.named_parameters() if predicate(table[name])]

    def ternary_weights(self) -> Iterator[TernaryWeight]:
        """Yield every ternary matrix, or stack of experts' matrices, layer by layer."""
        table = self.parameter_table()
        for name, parameter in self.named_parameters():
            info = table[name]
            if info.ternary and info.layer is not None:
                yield TernaryWeight(info.layer, info.local_name.removesuffix(".weight"), parameter, info.routed)

    def _run_blocks(
        self,
        tokens: Tensor,
        documents: Tensor,
        positions: Tensor,
        states: list[Any] | None,
        coordinates: TokenCoordinates | None,
        in_order: bool = False,
    ) -> tuple[Tensor, list[Any], list[RouterStats]]:
        position = make_position_info(documents, positions, self.config.retention.key_dim)
        position = position._replace(decoding=in_order)
        x = self.embedding(tokens)
        new_states: list[Any] = []
        router_stats: list[RouterStats] = []
        for layer, block in enumerate(self.blocks):
            router_inputs = None
            if isinstance(block.mixture, MixtureOfExperts):
                row = len(router_stats)
                router_inputs = RouterInputs(
                    self.routers.bias[row], self.routers.prev_load[row], self.routers.step, coordinates
                )
            x, state, stats = block(x, position, None if states is None else states[layer], router_inputs)
            new_states.append(state)
            if stats is not None:
                router_stats.append(stats)
        return x, new_states, router_stats


def make_expert_link(
    config: ModelConfig, placement: ExpertPlacement, mesh: Mesh, parallel: ParallelConfig, traffic: Traffic
) -> ExpertLink:
    """Return how one mixture's tokens travel to experts; only quantized inputs can travel as int8."""
    int8 = config.quantize and parallel.dispatch_dtype == "int8"
    backward_int8 = parallel.dispatch_grad_dtype == "int8"
    return ExpertLink(placement, mesh.expert_group, mesh.expert_nodes, int8, backward_int8, traffic)


def make_sequence_link(config: ModelConfig, mesh: Mesh, parallel: ParallelConfig) -> SequenceLink | None:
    """Return how retention's states travel between slices; None where sequences are whole."""
    if mesh.sequence_group is None:
        return None
    decays = log_decays(config.retention.decay, config.retention.num_heads)
    return SequenceLink(mesh.sequence_group, mesh.sequence_parallel, decays, parallel.state_exchange)


def build_model(config: Config, mesh: Mesh) -> MixKABRN:
    """Return this rank's part of the model, on its device, with its initial weights."""
    placement = ExpertPlacement.from_config(config, mesh.expert_rank)
    model = MixKABRN(config.model, placement, mesh, config.parallel)
    model.initialize(config.run.seed)
    return model.to(mesh.device)
