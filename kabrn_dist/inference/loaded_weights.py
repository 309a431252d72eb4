"""The weights of a model in memory, as exports write them, with the codes that it computes with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from kabrn_dist.inference.checkpoint_weights import distinct_scales
from kabrn_dist.inference.code_patches import read_matrices
from kabrn_dist.inference.run import Run
from kabrn_dist.model.fixed_codes import MergedCodes
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.codes_latents import make_latents
from kabrn_dist.ops.weight_quant import TernaryModule


class LoadedWeights:
    """The weights of a model in memory, in fp32; see `ExportSource`.

    Args:
        model: A full model in this process, whose ternary codes are those that are attached to it or, in a fine-tuning,
            merged with trained factors.
        changed: Parameters whose values are others than the model's.
    """

    def __init__(self, model: MixKABRN, changed: Mapping[str, Tensor]) -> None:
        self.lam = model.quant.lam if model.config.quantize else 0.0
        self._group, self._model = model.config.scale_group_size, model
        table = model.parameter_table()
        named = ((name, parameter.detach()) for name, parameter in model.named_parameters())
        # What is trained beside the weights is in the codes, or is `changed`.
        parameters = {name: values for name, values in named if table[name].role != "adapter"}
        self.dtypes = dict.fromkeys(parameters, torch.float32)
        self._values = {**parameters, **model.routers.named(), **changed}
        self.shapes = {name: tuple(values.shape) for name, values in self._values.items()}

    def read(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return elements [start, stop) of a flattened parameter, or state, in a dtype."""
        return self._values[name].reshape(-1)[start:stop].to("cpu", dtype)

    def packed_codes(self, name: str) -> Iterator[Tensor]:
        """Yield the uint8 that `pack` makes of all codes of a ternary parameter."""
        packed = read_matrices(self._model, name).packed
        assert packed is not None
        yield packed.cpu()

    def scales(self, name: str) -> Tensor:
        """Return the scales [E,S] fp32 of a ternary parameter."""
        return distinct_scales(read_matrices(self._model, name).gamma, self._group).cpu()


@torch.no_grad()
def find_latents(model: MixKABRN, names: Iterable[str]) -> dict[str, Tensor]:
    """Return latents that round to a model's codes, without those parameters for which there are none.

    Args:
        model: A full model in this process, whose codes are not those of its own latents.
        names: Of ternary parameters.
    """
    group, latents = model.config.scale_group_size, {}
    for name in names:
        matrices = read_matrices(model, name)
        scales = distinct_scales(matrices.gamma, group).cpu()
        found = make_latents(matrices.codes(torch.int8).cpu(), scales, group)
        if found is not None:
            latents[name] = found.view(model.get_parameter(name).shape)
    return latents


def load_merged(run: Run) -> LoadedWeights:
    """Return the weights of a base with the codes and scales that the forward pass of its fine-tuning multiplies by.

    Args:
        run: Of `finetune.method` ternary_lora.

    Raises:
        UserError: for a checkpoint that cannot be read, and if the base is not there or is another one by now.
    """
    model = run.model()
    return LoadedWeights(model, find_latents(model, _list_merged(model)))


def _list_merged(model: MixKABRN) -> list[str]:
    """The names of the parameters whose codes are merged with trained factors."""
    modules = ((prefix, module) for prefix, module in model.named_modules() if isinstance(module, TernaryModule))
    return [
        f"{prefix}.{leaf}"
        for prefix, module in modules
        for leaf, source in module.sources.items()
        if isinstance(source, MergedCodes)
    ]
