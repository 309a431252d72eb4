"""Exports of a model with an adapter in its weights, for everything that reads exports and knows no adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.config.file import load_config
from kabrn_dist.inference.adapters import set_adapters
from kabrn_dist.inference.checkpoint_weights import distinct_scales
from kabrn_dist.inference.code_patches import read_matrices
from kabrn_dist.inference.export import Export, lay_out_export, list_ternary
from kabrn_dist.inference.folder import is_export
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.run import Run
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.codes_latents import make_latents
from kabrn_dist.utils.errors import UserError


class LoadedWeights:
    """The weights of a model in memory, in fp32; see `ExportSource`.

    Args:
        model: A full model in this process, whose ternary codes are those that are attached to it.
        changed: Parameters whose values are others than the model's.
    """

    def __init__(self, model: MixKABRN, changed: Mapping[str, Tensor]) -> None:
        self.lam = model.quant.lam if model.config.quantize else 0.0
        self._group, self._model = model.config.scale_group_size, model
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
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
def merge_adapter(model: MixKABRN, adapter: Adapter) -> LoadedWeights:
    """Attach an adapter to a model, and return weights that hold it.

    Args:
        model: A full model in this process, to which nothing is attached.
        adapter: Of its codes.

    Raises:
        UserError: for an adapter of another model, or one that weights cannot hold.
    """
    _check_method(model, adapter)
    set_adapters(model, [(adapter, 1)])
    changed = {}
    for name, factors in adapter.low_ranks.items():
        a, b = (torch.from_numpy(part).double() for part in factors)
        weight = model.get_parameter(name).detach().cpu()
        changed[name] = (weight.double() + (b @ a).view(weight.shape)).float()
    for name in adapter.patches:
        matrices = read_matrices(model, name)
        group = model.config.scale_group_size
        # Training goes on from what is rounded to the patched codes.
        latents = make_latents(matrices.codes(torch.int8).cpu(), distinct_scales(matrices.gamma, group).cpu(), group)
        if latents is not None:
            changed[name] = latents.view(model.get_parameter(name).shape)
    return LoadedWeights(model, changed)


def plan_merged_export(folder: Path, adapter: Adapter) -> Export:
    """Load a model and put an adapter into its weights. Write nothing.

    Args:
        folder: A run, of which the newest intact checkpoint is used, or an export.
        adapter: Of its codes.

    Raises:
        UserError: for a folder that is neither, contents that are damaged, and an adapter of another model, or one that
            weights cannot hold.
    """
    if is_export(folder):
        model, tokenizer = load_export(folder)
        config, path, step = load_config(folder / "config.yaml"), folder, model.routers.step
    else:
        run = Run.open(folder)
        model, tokenizer, config, path, step = run.model(), run.tokenizer(), run.config, run.checkpoint, run.step
    weights = merge_adapter(model, adapter)
    return lay_out_export(config, path, step, tokenizer, weights, weights.dtypes, list_ternary(config, weights))


def _check_method(model: MixKABRN, adapter: Adapter) -> None:
    name, table = adapter.info.name, model.parameter_table()
    if adapter.states:
        raise UserError(
            f"adapter {name!r} holds states that documents begin with, and weights have no place for them; keep it "
            "beside the model: mixkabrn generate MODEL --adapter ADAPTER"
        )
    ternary = [each for each in adapter.low_ranks if each in table and table[each].ternary]
    if ternary:
        raise UserError(
            f"adapter {name!r} adds factors to {ternary[0]} and {len(ternary) - 1} other ternary parameters, and their "
            "sum is not ternary any more; keep it beside the model (generate --adapter, adapter pack), or train with "
            "finetune.method ternary_lora, which can be merged"
        )
