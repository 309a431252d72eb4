"""The model: embed → N × [x + Mixer(x); x + MixtureOfKANs(x)] → norm → head; a mixer is retention or attention.

Shapes: B batch, T time, D width, C vocabulary, E routed experts, L layers that hold a mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn
from torch.nn import functional as F

from kabrn_dist.config import Config, ModelConfig, ParallelConfig
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.all_to_all import ExpertLink, Traffic
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.distributed.state_scan import SequenceLink
from kabrn_dist.model.attention import Attention
from kabrn_dist.model.experts.base import Experts
from kabrn_dist.model.init import draw_normal
from kabrn_dist.model.mixer import Mixer, MixerState, PositionInfo, make_position_info
from kabrn_dist.model.moe import DenseFeedForward, MixtureOfExperts, RouterInputs
from kabrn_dist.model.retention import Retention
from kabrn_dist.model.router import Router, RouterStates, RouterStats, TokenCoordinates
from kabrn_dist.model.short_conv import ShortConv, last_inputs, preceding_inputs
from kabrn_dist.ops.activation_quant import rms_norm
from kabrn_dist.ops.retention import log_decays
from kabrn_dist.ops.weight_quant import QuantState, TernaryModule


class BatchStats(NamedTuple):
    """What one forward pass says of its batch, as sums over it; batches and ranks add up.

    Attributes:
        language: scalar fp32, Σ over targets of the cross-entropy in nats. Differentiable.
        balance, global_balance, z: scalars, Σ over layers of the routers' sums. Differentiable.
        load: [L,E] copies that chose each expert.
        entropy: [L] Σ over tokens of the routers' entropy in nats.
        dropped: [L] copies beyond the experts' capacity.
        rows: [B] the sum `language`, row by row. Not differentiable, and rows do not add up over batches.
    """

    language: Tensor
    balance: Tensor
    global_balance: Tensor
    z: Tensor
    tokens_per_expert: Tensor
    entropy: Tensor
    dropped: Tensor
    rows: Tensor


class Block(nn.Module):
    """A mixer and a feed-forward, each added to the stream.

    Args:
        mixer: retention or attention. mixture: of experts, or one dense network.
        settings: of the model; whether convolutions stand in front of both, and what is kept for backward.
    """

    def __init__(self, mixer: Mixer, mixture: MixtureOfExperts | DenseFeedForward, config: ModelConfig) -> None:
        super().__init__()
        self.mixer, self.mixture = mixer, mixture
        self.convolution = ShortConv(config.hidden_size, config.short_conv_size) if config.short_conv_size else None
        activations = config.activation_checkpointing
        if activations != "keep":
            # Only parts without a collective are recomputed, so the all-to-alls run once, in one order.
            for part, names in ((mixer, ("inputs", "output")), (mixture, ("routed", "shared"))):
                for name in names:
                    if getattr(part, name, None) is not None:
                        wrapped = checkpoint_wrapper(getattr(part, name), offload_to_cpu=activations == "offload")
                        setattr(part, name, wrapped)

    def forward(
        self, x: Tensor, place: PositionInfo, state: Any, guide: RouterInputs | None
    ) -> tuple[Tensor, Any, RouterStats | None]:
        """[B,T,D] → [B,T,D], the mixer's state, the router's sums; no guide and no sums for a dense network."""
        between = state.ffn_conv_state if isinstance(state, MixerState) else None
        mixed, state = self.mixer(x, place, state)
        x = read = x + mixed
        if self.convolution is not None:
            before = preceding_inputs(x, self.mixer.kernel_size - 1, between, self.mixer.group)
            read = self.convolution(x, before, place.positions)
            state = state._replace(ffn_conv_state=last_inputs(before, x)) if isinstance(state, MixerState) else state
        if guide is None:
            return x + self.mixture(read), state, None
        thought, sums = self.mixture(read, guide)
        return x + thought, state, sums


class MixKABRN(nn.Module):
    """A Mixture of Kolmogorov-Arnold Bit Retentive Networks. Holds this rank's experts only.

    Args:
        settings: the `model` section.
        placement: routed experts on each rank of the expert group.
        mesh: this process among the others.
        parallel: how states and copies travel between ranks.

    Attributes:
        routers: what the routers carry from step to step.
        traffic: of each mixture's exchange, counted by this process.
        blend: how far all ternary modules are quantised.
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
        wires = {
            layer: make_expert_link(config, placement, mesh, parallel, traffic)
            for layer, traffic in zip(config.moe_layers, self.traffic, strict=True)
        }
        # Each block adds two terms to the stream; this keeps the sum's variance from growing with depth.
        gain = 1 / math.sqrt(2 * len(config.layers))
        link = make_sequence_link(config, mesh, parallel)
        self.quant = QuantState(float(config.quantize), config.scale_group_size)
        quantized = self.quant if config.quantize else False
        blocks = []
        for layer, kind in enumerate(config.layers):
            heads = config.hidden_size, config.retention, quantized, gain
            kernel_size = config.short_conv_size
            mixer = (
                Retention(*heads, link, kernel_size)
                if kind == "R"
                else Attention(*heads, mesh.sequence_group, kernel_size)
            )
            wire = wires.get(layer)
            mixture = (
                MixtureOfExperts(config, gain, wire, mesh.sequence_group, quant=quantized)
                if wire
                else DenseFeedForward(config, gain, quantized)
            )
            blocks.append(Block(mixer, mixture, config))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def initialize(self, seed: int) -> None:
        """Draw every logical tensor from `seed` and its name: the same for any world size and placement."""
        self.embedding.weight.data.copy_(draw_normal(seed, "embedding", tuple(self.embedding.weight.shape), 0.5))
        self.head.weight.data.copy_(draw_normal(seed, "head", tuple(self.head.weight.shape), 0.02))
        for name, module in self.blocks.named_modules():
            if hasattr(module, "initialize"):
                module.initialize(seed, f"blocks.{name}")

    def forward(self, batch: Batch) -> BatchStats:
        """The batch's sums. Every sequence starts with an empty state."""
        places = TokenCoordinates(batch.tokens, batch.documents, batch.positions)
        x, _, routers = self._stream(batch.tokens, batch.documents, batch.positions, None, places)
        logits = self.head(rms_norm(x)).float()
        nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        rows = nats.view_as(batch.targets).sum(1)
        language = rows.sum()
        return BatchStats(*(language, *self._add_up(routers, language), rows.detach()))

    def _add_up(self, routers: list[RouterStats], like: Tensor) -> Iterator[Tensor]:
        """The layers' sums: losses summed up, statistics stacked."""
        if not routers:
            nothing = like.new_zeros(())
            return iter((nothing, nothing, nothing, self.routers.bias.clone(), like.new_zeros(0), like.new_zeros(0)))
        total = RouterStats(*(torch.stack(parts) for parts in zip(*routers, strict=True)))
        losses = total.balance.sum(), total.global_balance.sum(), total.z.sum()
        return iter((*losses, total.tokens_per_expert, total.entropy, total.dropped))

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, documents: Tensor, positions: Tensor, states: list[Any] | None
    ) -> tuple[Tensor, list[Any]]:
        """Read tokens [B,T] on top of `states` (None: nothing read yet; else of the first token's document).

        Returns:
            The last token's logits [B,C] fp32, and one state a layer, all that decoding keeps: [B,H,K,V] of a
            retention, whatever the length; the keys and values so far of an attention; with a convolution, beside
            that, the last few inputs.
        """
        x, states, _ = self._stream(tokens, documents, positions, states, None)
        return self.head(rms_norm(x[:, -1])).float(), states

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of this rank's routed experts, layer by layer."""
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                yield from module.routed.parameters()

    def function_parameters(self) -> Iterator[nn.Parameter]:
        """Of learnable functions and convolutions: they do not decay and have a learning rate of their own."""
        for module in self.modules():
            if isinstance(module, ShortConv):
                yield module.weight
            if isinstance(module, Experts):
                yield from (p for name, p in module.named_parameters() if name not in module.stds)

    def router_weights(self) -> Iterator[nn.Parameter]:
        """Router matrices, layer by layer."""
        yield from (module.weight for module in self.modules() if isinstance(module, Router))

    def sharded_parameters(self) -> Iterator[nn.Parameter]:
        """Pieces of ternary matrices that are shared out over ranks."""
        for module in self.modules():
            if isinstance(module, TernaryModule):
                yield from (module.get_parameter(name) for name in module.sources)

    def ternary_weights(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(layer, latent weight [O,I] or [E,O,I]) of every ternary matrix."""
        for layer, block in enumerate(self.blocks):
            for module in block.modules():
                if isinstance(module, TernaryModule):
                    yield from ((layer, module.get_parameter(name)) for name in module.stds)

    def _stream(
        self,
        tokens: Tensor,
        documents: Tensor,
        positions: Tensor,
        states: list[Any] | None,
        places: TokenCoordinates | None,
    ) -> tuple[Tensor, list[Any], list[RouterStats]]:
        place = make_position_info(documents, positions, self.config.retention.key_dim)
        x = self.embedding(tokens)
        ends: list[Any] = []
        routers: list[RouterStats] = []
        for layer, block in enumerate(self.blocks):
            guide = None
            if isinstance(block.mixture, MixtureOfExperts):
                row = len(routers)
                guide = RouterInputs(self.routers.bias[row], self.routers.prev_load[row], self.routers.step, places)
            x, state, sums = block(x, place, None if states is None else states[layer], guide)
            ends.append(state)
            if sums is not None:
                routers.append(sums)
        return x, ends, routers


def make_expert_link(
    config: ModelConfig, placement: ExpertPlacement, mesh: Mesh, parallel: ParallelConfig, traffic: Traffic
) -> ExpertLink:
    """How one mixture's copies travel; only quantised inputs can travel as int8."""
    int8 = config.quantize and parallel.dispatch_dtype == "int8"
    backward_int8 = parallel.dispatch_grad_dtype == "int8"
    return ExpertLink(placement, mesh.expert_group, mesh.expert_nodes, int8, backward_int8, traffic)


def make_sequence_link(config: ModelConfig, mesh: Mesh, parallel: ParallelConfig) -> SequenceLink | None:
    """How retention's states travel between slices; None where sequences are whole."""
    if mesh.sequence_group is None:
        return None
    decays = log_decays(config.retention.decay, config.retention.num_heads)
    return SequenceLink(mesh.sequence_group, mesh.sequence_parallel, decays, parallel.state_exchange)


def build_model(config: Config, mesh: Mesh) -> MixKABRN:
    """This rank's part of the model, on its device, with its initial weights."""
    placement = ExpertPlacement.from_config(config, mesh.expert_rank)
    model = MixKABRN(config.model, placement, mesh, config.parallel)
    model.initialize(config.run.seed)
    return model.to(mesh.device)
