"""The origin of each tensor of a grown model in the old model."""

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
from kabrn_dist.model.parameters import ParameterInfo
from kabrn_dist.model.router import Router


def empty_model(config: Config) -> MixKABRN:
    """Return the whole model with weights that are allocated but not written, so they take no memory on Linux."""
    return MixKABRN(config.model, ExpertPlacement.single(config.model.experts.num_experts), single_process_mesh())


def list_mappings(plan: GrowthPlan, old: MixKABRN, new: MixKABRN) -> list[TensorMapping]:
    """Return the mapping of each parameter of `new`, in the order of its parameters."""
    shapes = {name: tuple(p.shape) for name, p in old.named_parameters()}
    table = new.parameter_table()
    return [_map_tensor(plan, new, table[name], tuple(p.shape), shapes) for name, p in new.named_parameters()]


def draw_initial(model: MixKABRN, mapping: TensorMapping, seed: int) -> Tensor:
    """Return the initial values of a parameter in a new run, or zeros.

    Drawing writes the weights of the parameter's module in `model`, which take up memory from then on.

    Args:
        model: The grown model, from `empty_model`.
        mapping: The parameter, which has no source.
        seed: Seed of the run.
    """
    module_name, _, leaf = mapping.name.rpartition(".")
    if mapping.starts_at_zero:
        return torch.zeros(mapping.shape)
    module = model.get_submodule(module_name)
    assert isinstance(module, Router | Experts)
    module.initialize(seed, module_name)
    return module.get_parameter(leaf).detach()


def _map_tensor(
    plan: GrowthPlan, new: MixKABRN, info: ParameterInfo, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]
) -> TensorMapping:
    name, layer = info.name, info.layer
    module_name, _, leaf = name.rpartition(".")
    part = module_name.rpartition(".")[2]
    module = new.get_submodule(module_name)
    is_matrix = isinstance(module, Experts) and info.role == "matrix"
    is_output = isinstance(module, Experts) and is_matrix and module.matrix_specs[leaf].reads_hidden
    if layer in plan.upcycled_layers and part == "router":
        return TensorMapping(name, shape, None, "newly initialized")
    if layer in plan.upcycled_layers and part == "shared":
        description = "zeros: adds nothing at the start" if is_output else "newly initialized"
        return TensorMapping(name, shape, None, description, starts_at_zero=is_output)
    source = name
    copies, copies_per_token = 1, 1
    if layer in plan.upcycled_layers and part == "routed":
        source = f"{module_name.removesuffix('routed')}shared.{leaf}"
        copies, copies_per_token = shape[0], plan.new.experts.top_k
    elif layer in plan.copied_layers and part in ("routed", "router"):
        copies, copies_per_token = plan.copies, plan.copies_per_token
    refinement = _refinement(plan) if shapes[source][1:] != shape[1:] else None
    copied = copies > 1
    return TensorMapping(
        name,
        shape,
        source,
        _describe(source if source != name else "", copies, refinement),
        copies,
        copies_per_token,
        refinement,
        hidden_size=plan.new.experts.expert_hidden_size if copied and is_matrix else 0,
        is_output=is_output,
        adds_noise=copied and (is_matrix or part == "router"),
    )


def _refinement(plan: GrowthPlan) -> GridRefinement:
    old, new = plan.old.experts, plan.new.experts
    return GridRefinement(old.grid_size, new.grid_size, new.spline_order if new.type == "bspline" else 1)


def _describe(source: str, copies: int, refinement: GridRefinement | None) -> str:
    parts = []
    if source:
        parts.append(f"{copies} copies of the dense layer's")
    elif copies > 1:
        parts.append(f"{copies} copies of each")
    if refinement:
        parts.append(f"grid {refinement.old_size} → {refinement.new_size}")
    return ", ".join(parts) or "unchanged"
