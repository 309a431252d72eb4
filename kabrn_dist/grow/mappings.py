"""Which tensor of the old model each one of the grown model comes from."""

from __future__ import annotations

import torch
from torch import Tensor

from kabrn_dist.config import Config
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.grow.plan import GrowthPlan
from kabrn_dist.grow.tensors import GridRefinement, TensorMapping
from kabrn_dist.model.experts.base import Experts
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.router import Router

# What the forms of experts call the matrices that read hidden units.
OUTPUT_PREFIXES = ("down", "outer")


def empty_model(config: Config) -> MixKABRN:
    """The whole model with weights that were never written, so that (on Linux) they take addresses, not memory."""
    return MixKABRN(config.model, ExpertPlacement.single(config.model.experts.num_experts), single_process_mesh())


def list_mappings(plan: GrowthPlan, old: MixKABRN, new: MixKABRN) -> list[TensorMapping]:
    """One for each parameter of `new`, in its order."""
    shapes = {name: tuple(p.shape) for name, p in old.named_parameters()}
    return [_map_tensor(plan, new, name, tuple(p.shape), shapes) for name, p in new.named_parameters()]


def draw_initial(model: MixKABRN, mapping: TensorMapping, seed: int) -> Tensor:
    """The values that a new run would start this parameter with, or zeros. Memory: its module's, which stays."""
    module_name, _, leaf = mapping.name.rpartition(".")
    if mapping.starts_at_zero:
        return torch.zeros(mapping.shape)
    module = model.get_submodule(module_name)
    assert isinstance(module, Router | Experts)
    module.initialize(seed, module_name)
    return module.get_parameter(leaf).detach()


def _map_tensor(
    plan: GrowthPlan, new: MixKABRN, name: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]
) -> TensorMapping:
    module_name, _, leaf = name.rpartition(".")
    layer, part = _layer(name), module_name.rpartition(".")[2]
    module = new.get_submodule(module_name)
    is_matrix = isinstance(module, Experts) and leaf in module.stds
    is_output = is_matrix and leaf.startswith(OUTPUT_PREFIXES)
    if layer in plan.upcycled_layers and part == "router":
        return TensorMapping(name, shape, None, "drawn afresh")
    if layer in plan.upcycled_layers and part == "shared":
        what = "zeros: it adds nothing yet" if is_output else "drawn afresh"
        return TensorMapping(name, shape, None, what, starts_at_zero=is_output)
    source = name
    copies, visited = 1, 1
    if layer in plan.upcycled_layers and part == "routed":
        source = f"{module_name.removesuffix('routed')}shared.{leaf}"
        copies, visited = shape[0], plan.new.experts.top_k
    elif layer in plan.copied_layers and part in ("routed", "router"):
        copies, visited = plan.copies, plan.copies_per_token
    finer = _finer(plan) if shapes[source][1:] != shape[1:] else None
    breaks = copies > 1
    return TensorMapping(
        name,
        shape,
        source,
        _describe(source if source != name else "", copies, finer),
        copies,
        visited,
        finer,
        hidden_size=plan.new.experts.expert_hidden_size if breaks and is_matrix else 0,
        is_output=is_output,
        adds_noise=breaks and (is_matrix or part == "router"),
    )


def _layer(name: str) -> int | None:
    """blocks.3.mixture.routed.up → 3; None outside the blocks."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None


def _finer(plan: GrowthPlan) -> GridRefinement:
    old, new = plan.old.experts, plan.new.experts
    return GridRefinement(old.grid_size, new.grid_size, new.spline_order if new.type == "bspline" else 1)


def _describe(source: str, copies: int, finer: GridRefinement | None) -> str:
    said = []
    if source:
        said.append(f"{copies} copies of the dense layer's")
    elif copies > 1:
        said.append(f"{copies} copies of each")
    if finer:
        said.append(f"grid {finer.old_size} → {finer.new_size}")
    return ", ".join(said) or "as it was"
