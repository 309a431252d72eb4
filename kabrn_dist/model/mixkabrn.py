"""The model: embed → N × [x + Mixer(x); x + MixtureOfKANs(x)] → norm → head; a mixer is retention or attention.

Shapes: B batch, T time, D width, C vocabulary, E routed experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn
from torch.nn import functional as F

from kabrn_dist.config import Config
from kabrn_dist.config import Model as Settings
from kabrn_dist.data.batches import Batch
from kabrn_dist.mesh import Mesh
from kabrn_dist.model.attention import Attention
from kabrn_dist.model.bitlinear import BitLinear, rms_norm
from kabrn_dist.model.initial import draw_normal
from kabrn_dist.model.kan.stacked import StackedExperts
from kabrn_dist.model.mixer import Place, find_place
from kabrn_dist.model.moe import MixtureOfExperts, RouterSums
from kabrn_dist.model.retention import Retention, log_decays
from kabrn_dist.parallel.placement import Placement
from kabrn_dist.parallel.sequence import Exchange, SequenceLink


class Sums(NamedTuple):
    """What one forward pass says of its batch, as sums over it; batches and ranks add up.

    Attributes:
        language: scalar fp32, Σ over targets of the cross-entropy in nats. Differentiable.
        balance, z: scalars, Σ over layers of the routers' sums. Differentiable.
        load: [L,E] copies sent to each expert.
        entropy: [L] Σ over tokens of the routers' entropy in nats.
    """

    language: Tensor
    balance: Tensor
    z: Tensor
    load: Tensor
    entropy: Tensor


class Block(nn.Module):
    """A mixer (`kind` R: retention, A: attention) and a mixture of experts, each added to the stream."""

    def __init__(
        self, kind: str, settings: Settings, placement: Placement, mesh: Mesh, link: SequenceLink | None
    ) -> None:
        super().__init__()
        # Each block adds two terms to the stream; this keeps the sum's variance from growing with depth.
        gain = 1 / math.sqrt(2 * len(settings.layers))
        width, quantised = settings.width, settings.quantise
        heads = width, settings.retention, quantised, gain
        self.mixer = Retention(*heads, link) if kind == "R" else Attention(*heads, mesh.sequence_group)
        groups = mesh.expert_group, mesh.sequence_group
        self.mixture = MixtureOfExperts(width, settings.experts, quantised, gain, placement, *groups)
        if settings.activations != "keep":
            # Only parts without a collective are recomputed, so the all-to-alls run once, in one order.
            offload = settings.activations == "offload"
            self.mixer.inputs = checkpoint_wrapper(self.mixer.inputs, offload_to_cpu=offload)
            self.mixer.output = checkpoint_wrapper(self.mixer.output, offload_to_cpu=offload)
            self.mixture.routed = checkpoint_wrapper(self.mixture.routed, offload_to_cpu=offload)
            if self.mixture.shared is not None:
                self.mixture.shared = checkpoint_wrapper(self.mixture.shared, offload_to_cpu=offload)

    def forward(self, x: Tensor, place: Place, state: Any) -> tuple[Tensor, Any, RouterSums]:
        """[B,T,D] → [B,T,D], the mixer's state, the router's sums."""
        mixed, state = self.mixer(x, place, state)
        x = x + mixed
        thought, sums = self.mixture(x)
        return x + thought, state, sums


class MixKABRN(nn.Module):
    """A Mixture of Kolmogorov-Arnold Bit Retentive Networks. Holds this rank's experts only.

    Args:
        settings: the `model` section.
        placement: routed experts on each rank of the expert group.
        mesh: this process among the others.
        exchange: how retention's states travel between slices of a sequence.
    """

    def __init__(self, settings: Settings, placement: Placement, mesh: Mesh, exchange: Exchange = "auto") -> None:
        super().__init__()
        self.settings, self.placement = settings, placement
        self.embedding = nn.Embedding(settings.vocabulary, settings.width)
        link = None
        if mesh.sequence_group is not None:
            decays = log_decays(settings.retention.decay, settings.retention.heads)
            link = SequenceLink(mesh.sequence_group, mesh.sequence, decays, exchange)
        self.blocks = nn.ModuleList(Block(kind, settings, placement, mesh, link) for kind in settings.layers)
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
        x, _, routers = self._stream(batch.tokens, batch.documents, batch.positions, None)
        logits = self.head(rms_norm(x)).float()
        language = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
        balance, z, load, entropy = (torch.stack(parts) for parts in zip(*routers, strict=True))
        return Sums(language, balance.sum(), z.sum(), load, entropy)

    @torch.no_grad()
    def read(
        self, tokens: Tensor, documents: Tensor, positions: Tensor, states: list[Any] | None
    ) -> tuple[Tensor, list[Any]]:
        """Read tokens [B,T] on top of `states` (None: nothing read yet; else of the first token's document).

        Returns:
            The last token's logits [B,C] fp32, and one state a layer, all that decoding keeps: [B,H,K,V] of a
            retention, whatever the length; the keys and values so far of an attention.
        """
        x, states, _ = self._stream(tokens, documents, positions, states)
        return self.head(rms_norm(x[:, -1])).float(), states

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of this rank's routed experts, layer by layer."""
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                yield from module.routed.parameters()

    def bit_weights(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(layer, latent weight [O,I] or [E,O,I]) of every ternary matrix."""
        for layer, block in enumerate(self.blocks):
            for module in block.modules():
                if isinstance(module, BitLinear):
                    yield layer, module.weight
                elif isinstance(module, StackedExperts):
                    yield from ((layer, module.get_parameter(name)) for name in module.stds)

    def _stream(
        self, tokens: Tensor, documents: Tensor, positions: Tensor, states: list[Any] | None
    ) -> tuple[Tensor, list[Any], list[RouterSums]]:
        place = find_place(documents, positions, self.settings.retention.key_width)
        x = self.embedding(tokens)
        ends, routers = [], []
        for layer, block in enumerate(self.blocks):
            x, state, sums = block(x, place, None if states is None else states[layer])
            ends.append(state)
            routers.append(sums)
        return x, ends, routers


def build_model(config: Config, mesh: Mesh) -> MixKABRN:
    """This rank's part of the model, on its device, with its initial weights."""
    placement = (
        Placement(config.placement(), mesh.expert_rank)
        if mesh.expert > 1
        else Placement((config.model.experts.routed,), 0)
    )
    model = MixKABRN(config.model, placement, mesh, config.parallel.exchange)
    model.initialise(config.run.seed)
    return model.to(mesh.device)
