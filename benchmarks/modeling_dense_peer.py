"""The dense Transformer of MixKABRN's quality benchmark for transformers: rotary positions, query-key norm, SwiGLU.

No published class has its gate on the heads' results with the norm behind it, nor its short convolutions, so it comes
with its code. Torch and transformers are all that it needs. It keeps no cache: generation reads the text again.

Shapes: B rows, T tokens of a row, D width, H heads, K width of a head, C vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class DensePeerConfig(PretrainedConfig):
    """Sizes of the model.

    Attributes:
        gated: whether heads have a SiLU gate, and an RMSNorm behind it.
        taps: earlier tokens that the convolutions in front of attention and feed-forward see; 0: no convolutions.
    """

    model_type = "dense_peer"

    def __init__(
        self,
        vocab_size: int = 65,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 347,
        gated: bool = True,
        taps: int = 0,
        **others: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.gated, self.taps = gated, taps
        others = {"tie_word_embeddings": False, "use_cache": False, **others}
        super().__init__(**others)


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


class DensePeerLayer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: DensePeerConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.heads, self.gated, taps = config.num_attention_heads, config.gated, config.taps
        self.taps = nn.ParameterList(nn.Parameter(torch.zeros(taps, width)) for _ in range(2 if taps else 0))
        self.inputs = nn.Linear(width, (3 + config.gated) * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[B,T,D] → [B,T,D]; mask [B,1,T,T] says which tokens each sees."""
        q, k, v, *gate = self.inputs(_rms(self._convolve(x, 0))).chunk(3 + self.gated, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        q, k = (_rms(_rotate(part, cos, sin)) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        if gate:
            mixed = _rms(mixed * F.silu(gate[0]))
        x = x + self.out(mixed)
        left, right = self.up(_rms(self._convolve(x, 1))).chunk(2, -1)
        return x + self.down(F.silu(left) * right)

    def _convolve(self, x: Tensor, place: int) -> Tensor:
        if not len(self.taps):
            return x
        weight = self.taps[place]
        return x + sum(weight[j] * F.pad(x, (0, 0, j + 1, 0))[:, : x.shape[1]] for j in range(len(weight)))


class DensePeerForCausalLM(PreTrainedModel, GenerationMixin):
    """The model; texts begin at position 0, and padding on the left is left out of sight."""

    config_class = DensePeerConfig
    base_model_prefix = ""
    _no_split_modules = ("DensePeerLayer",)

    def __init__(self, config: DensePeerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(DensePeerLayer(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Return logits [B,T,C] of tokens [B,T], and the loss of labels [B,T], which are the tokens themselves."""
        assert input_ids is not None
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        x = self.embedding(input_ids) * seen[..., None]
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        speeds = 10000.0 ** (-torch.arange(0, 2 * half, 2, device=x.device) / (2 * half))
        angles = positions[:, None, :, None] * speeds
        time = torch.arange(x.shape[1], device=x.device)
        mask = (time[:, None] >= time)[None, None] & (seen[:, None, None, :] > 0) | torch.eye(
            x.shape[1], dtype=torch.bool, device=x.device
        )
        for block in self.blocks:
            x = block(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype), mask) * seen[..., None]
        logits = self.head(_rms(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return what `forward` reads: the whole text so far."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}
