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

from kabrn_dist.config import Config, Parallel
from kabrn_dist.config import Model as Settings
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.all_to_all import Traffic, Wire
from kabrn_dist.distributed.expert_placement import Placement
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.distributed.state_scan import SequenceLink
from kabrn_dist.model.attention import Attention
from kabrn_dist.model.experts.base import StackedExperts
from kabrn_dist.model.init import draw_normal
from kabrn_dist.model.mixer import Mixer, Place, State, find_place
from kabrn_dist.model.moe import DenseFeedForward, Guide, MixtureOfExperts
from kabrn_dist.model.retention import Retention
from kabrn_dist.model.router import Places, Router, RouterStates, RouterSums
from kabrn_dist.model.short_conv import Convolution, find_before, keep_recent
from kabrn_dist.ops.activation_quant import rms_norm
from kabrn_dist.ops.retention import log_decays
from kabrn_dist.ops.weight_quant import Blend, TernaryModule


class Sums(NamedTuple):
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
    load: Tensor
    entropy: Tensor
    dropped: Tensor
    rows: Tensor


class Block(nn.Module):
    """A mixer and a feed-forward, each added to the stream.

    Args:
        mixer: retention or attention. mixture: of experts, or one dense network.
        settings: of the model; whether convolutions stand in front of both, and what is kept for backward.
    """

    def __init__(self, mixer: Mixer, mixture: MixtureOfExperts | DenseFeedForward, settings: Settings) -> None:
        super().__init__()
        self.mixer, self.mixture = mixer, mixture
        self.convolution = Convolution(settings.width, settings.convolution) if settings.convolution else None
        activations = settings.activations
        if activations != "keep":
            # Only parts without a collective are recomputed, so the all-to-alls run once, in one order.
            for part, names in ((mixer, ("inputs", "output")), (mixture, ("routed", "shared"))):
                for name in names:
                    if getattr(part, name, None) is not None:
                        wrapped = checkpoint_wrapper(getattr(part, name), offload_to_cpu=activations == "offload")
                        setattr(part, name, wrapped)

    def forward(
        self, x: Tensor, place: Place, state: Any, guide: Guide | None
    ) -> tuple[Tensor, Any, RouterSums | None]:
        """[B,T,D] → [B,T,D], the mixer's state, the router's sums; no guide and no sums for a dense network."""
        between = state.between if isinstance(state, State) else None
        mixed, state = self.mixer(x, place, state)
        x = read = x + mixed
        if self.convolution is not None:
            before = find_before(x, self.mixer.taps, between, self.mixer.group)
            read = self.convolution(x, before, place.positions)
            state = state._replace(between=keep_recent(before, x)) if isinstance(state, State) else state
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

    def __init__(self, settings: Settings, placement: Placement, mesh: Mesh, parallel: Parallel | None = None) -> None:
        super().__init__()
        parallel = parallel or Parallel()
        self.settings, self.placement = settings, placement
        self.embedding = nn.Embedding(settings.vocabulary, settings.width)
        self.routers = RouterStates.fresh(len(settings.mixture_layers), settings.experts.routed, mesh.device)
        self.traffic = [Traffic() for _ in settings.mixture_layers]
        wires = {
            layer: make_wire(settings, placement, mesh, parallel, traffic)
            for layer, traffic in zip(settings.mixture_layers, self.traffic, strict=True)
        }
        # Each block adds two terms to the stream; this keeps the sum's variance from growing with depth.
        gain = 1 / math.sqrt(2 * len(settings.layers))
        link = make_link(settings, mesh, parallel)
        self.blend = Blend(float(settings.quantise), settings.scale_group)
        quantised = self.blend if settings.quantise else False
        blocks = []
        for layer, kind in enumerate(settings.layers):
            heads = settings.width, settings.retention, quantised, gain
            taps = settings.convolution
            mixer = Retention(*heads, link, taps) if kind == "R" else Attention(*heads, mesh.sequence_group, taps)
            wire = wires.get(layer)
            mixture = (
                MixtureOfExperts(settings, gain, wire, mesh.sequence_group, quantised=quantised)
                if wire
                else DenseFeedForward(settings, gain, quantised)
            )
            blocks.append(Block(mixer, mixture, settings))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(settings.width, settings.vocabulary, bias=False)

    def initialise(self, seed: int) -> None:
        """Draw every logical tensor from `seed` and its name: the same for any world size and placement."""
        self.embedding.weight.data.copy_(draw_normal(seed, "embedding", tuple(self.embedding.weight.shape), 0.5))
        self.head.weight.data.copy_(draw_normal(seed, "head", tuple(self.head.weight.shape), 0.02))
        for name, module in self.blocks.named_modules():
            if hasattr(module, "initialise"):
                module.initialise(seed, f"blocks.{name}")

    def forward(self, batch: Batch) -> Sums:
        """The batch's sums. Every sequence starts with an empty state."""
        places = Places(batch.tokens, batch.documents, batch.positions)
        x, _, routers = self._stream(batch.tokens, batch.documents, batch.positions, None, places)
        logits = self.head(rms_norm(x)).float()
        nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        rows = nats.view_as(batch.targets).sum(1)
        language = rows.sum()
        return Sums(*(language, *self._add_up(routers, language), rows.detach()))

    def _add_up(self, routers: list[RouterSums], like: Tensor) -> Iterator[Tensor]:
        """The layers' sums: losses summed up, statistics stacked."""
        if not routers:
            nothing = like.new_zeros(())
            return iter((nothing, nothing, nothing, self.routers.bias.clone(), like.new_zeros(0), like.new_zeros(0)))
        total = RouterSums(*(torch.stack(parts) for parts in zip(*routers, strict=True)))
        losses = total.balance.sum(), total.global_balance.sum(), total.z.sum()
        return iter((*losses, total.load, total.entropy, total.dropped))

    @torch.no_grad()
    def read(
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

    def coefficients(self) -> Iterator[nn.Parameter]:
        """Of learnable functions and convolutions: they do not decay and have a learning rate of their own."""
        for module in self.modules():
            if isinstance(module, Convolution):
                yield module.weight
            if isinstance(module, StackedExperts):
                yield from (p for name, p in module.named_parameters() if name not in module.stds)

    def router_weights(self) -> Iterator[nn.Parameter]:
        """Router matrices, layer by layer."""
        yield from (module.weight for module in self.modules() if isinstance(module, Router))

    def pieces(self) -> Iterator[nn.Parameter]:
        """Pieces of ternary matrices that are shared out over ranks."""
        for module in self.modules():
            if isinstance(module, TernaryModule):
                yield from (module.get_parameter(name) for name in module.sources)

    def bit_weights(self) -> Iterator[tuple[int, nn.Parameter]]:
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
        places: Places | None,
    ) -> tuple[Tensor, list[Any], list[RouterSums]]:
        place = find_place(documents, positions, self.settings.retention.key_width)
        x = self.embedding(tokens)
        ends: list[Any] = []
        routers: list[RouterSums] = []
        for layer, block in enumerate(self.blocks):
            guide = None
            if isinstance(block.mixture, MixtureOfExperts):
                row = len(routers)
                guide = Guide(self.routers.bias[row], self.routers.share[row], self.routers.step, places)
            x, state, sums = block(x, place, None if states is None else states[layer], guide)
            ends.append(state)
            if sums is not None:
                routers.append(sums)
        return x, ends, routers


def make_wire(settings: Settings, placement: Placement, mesh: Mesh, parallel: Parallel, traffic: Traffic) -> Wire:
    """How one mixture's copies travel; only quantised inputs can travel as int8."""
    int8 = settings.quantise and parallel.wire == "int8"
    backward_int8 = parallel.wire_backward == "int8"
    return Wire(placement, mesh.expert_group, mesh.expert_nodes, int8, backward_int8, traffic)


def make_link(settings: Settings, mesh: Mesh, parallel: Parallel) -> SequenceLink | None:
    """How retention's states travel between slices; None where sequences are whole."""
    if mesh.sequence_group is None:
        return None
    decays = log_decays(settings.retention.decay, settings.retention.heads)
    return SequenceLink(mesh.sequence_group, mesh.sequence, decays, parallel.exchange)


def build_model(config: Config, mesh: Mesh) -> MixKABRN:
    """This rank's part of the model, on its device, with its initial weights."""
    placement = (
        Placement(config.placement(), mesh.expert_rank)
        if mesh.expert > 1
        else Placement((config.model.experts.routed,), 0)
    )
    model = MixKABRN(config.model, placement, mesh, config.parallel)
    model.initialise(config.run.seed)
    return model.to(mesh.device)
