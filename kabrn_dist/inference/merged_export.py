"""Exports of a model with an adapter in its weights, for everything that reads exports and knows no adapters."""

from __future__ import annotations

from pathlib import Path

import torch

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.config.file import load_config
from kabrn_dist.inference.adapters import set_adapters
from kabrn_dist.inference.export import Export, lay_out_export, list_ternary
from kabrn_dist.inference.folder import is_export
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.loaded_weights import LoadedWeights, find_latents
from kabrn_dist.inference.run import Run
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError


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
    # Training goes on from what is rounded to the patched codes.
    return LoadedWeights(model, changed | find_latents(model, adapter.patches))


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
