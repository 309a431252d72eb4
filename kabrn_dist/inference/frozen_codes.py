"""Ternary codes of a model that is not trained any more: rounded once, and kept as products multiply them."""

from __future__ import annotations

import torch
from torch import nn

from kabrn_dist.kernels.selection import int8_matmul_is_faster
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.weight_quant import TernaryMatrices, TernaryModule, TernarySource, ternarize


class FrozenCodes(TernarySource):
    """The codes of one parameter, found again only when its values, its device or the quantization change.

    Args:
        module: The module that holds the parameter.
        source: Where its codes come from; None if they are rounded from its values.

    Attributes:
        source: The same.
    """

    def __init__(self, module: TernaryModule, source: TernarySource | None) -> None:
        self._quant, self.source = module.quant, source
        self._key: tuple[object, ...] | None = None
        self._found: TernaryMatrices | None = None

    def read(self, parameter: nn.Parameter) -> TernaryMatrices:
        """Return the matrices; gradients reach `parameter` straight through the rounding."""
        key = parameter._version, parameter.device, parameter.dtype, self._quant.lam
        latents = parameter if parameter.ndim == 3 else parameter[None]
        if self._found is None or key != self._key:
            self._key, self._found = key, self._find(parameter)
        if self._found.packed is None:
            # Plain, or blended with its codes: the values themselves are read, and carry the gradient.
            return ternarize(latents, self._quant.lam, self._quant.scale_group_size)
        return self._found._replace(latents=latents)

    @torch.no_grad()
    def _find(self, parameter: nn.Parameter) -> TernaryMatrices:
        latents = parameter if parameter.ndim == 3 else parameter[None]
        if self.source is not None:
            found = self.source.read(parameter)
        else:
            found = ternarize(latents, self._quant.lam, self._quant.scale_group_size)
        if found.packed is None:
            return TernaryMatrices(latents)
        if int8_matmul_is_faster(latents.device.type, latents.dtype):
            return found._replace(int8_codes=found.codes(torch.int8).contiguous())
        wide = found.codes(torch.promote_types(latents.dtype, torch.float32)).contiguous()
        return found._replace(int8_codes=None, wide_codes=wide)


def freeze_codes(model: MixKABRN) -> None:
    """Make a model keep its ternary codes instead of rounding its weights in every pass; results are the same bits.

    They take a byte a weight, or four on processors that multiply fp32 faster than int8. Values that are written
    through `.data`, as optimizers of large runs do, are not noticed: a model that is still trained is not to be frozen.
    """
    for module in model.modules():
        if isinstance(module, TernaryModule):
            for name in module.stds:
                source = module.sources.get(name)
                if not isinstance(source, FrozenCodes):
                    module.sources[name] = FrozenCodes(module, source)
