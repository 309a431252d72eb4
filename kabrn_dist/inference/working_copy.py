"""The dtypes that training computes with: half precision has working copies of most fp32 masters, but not of all.

Ternary codes are rounded from what the trainer computes with, so a matrix in another dtype has other codes.
"""

from __future__ import annotations

import torch

from kabrn_dist.config import Config
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.parameters import ParameterInfo
from kabrn_dist.utils.precision import TORCH_DTYPES


def empty_full_model(config: Config) -> MixKABRN:
    """Return a full model with all experts in this process, without memory for its values."""
    with torch.device("meta"):
        return MixKABRN(config.model, ExpertPlacement.single(config.model.experts.num_experts), single_process_mesh())


def working_dtypes(config: Config, world_size: int) -> dict[str, torch.dtype]:
    """Return the dtype in which training computes with each parameter of a full model, by name.

    It follows `backend/deepspeed.py`, which casts the parameters, but also holds for a run that has ended.

    Args:
        config: Configuration of the run.
        world_size: Processes of the run.
    """
    working = TORCH_DTYPES[config.training.precision]

    def dtype_of(info: ParameterInfo) -> torch.dtype:
        is_sharded = config.parallel.shard_ternary and world_size > 1 and info.ternary
        stays = config.parallel.zero_stage < 3 and (info.learned_function or info.role == "router")
        return torch.float32 if is_sharded or stays else working

    return {name: dtype_of(info) for name, info in empty_full_model(config).parameter_table().items()}


def round_to_working_copies(model: MixKABRN, config: Config, world_size: int) -> None:
    """Round the masters in a full model to what training computes with; without effect for a run in fp32.

    Args:
        model: Full model in fp32 with the masters of a checkpoint.
        config: Configuration of the run.
        world_size: Processes of the run.
    """
    dtypes = working_dtypes(config, world_size)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name]).to(parameter.dtype)
