"""ZeRO's flat shards as fragments of logical tensors, at every stage: the content of checkpoints.

Depends on internals of DeepSpeed 0.19.8. Each rank sees the fp32 masters and both moments it is responsible for, as
views: writing into them changes the run, and `sync_working_copy` then copies masters into the working copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor

from kabrn_dist.backend.engine import Engine
from kabrn_dist.checkpoint.fragment import Fragment

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedState(NamedTuple):
    """This rank's part of the training state.

    Attributes:
        fragments: live views of its part of every master and moment, and of the routers' states.
        updates: AdamW's own counter: optimizer steps without those that were skipped.
    """

    fragments: list[Fragment]
    updates: int


def sharded_state(engine: Engine) -> ShardedState:
    """Return this rank's part of the training state, for a checkpoint to be written from or read into.

    Fragments are named `<parameter>/master`, `…/exp_avg`, `…/exp_avg_sq`, and as the routers' states, which all ranks
    hold; of an adapter in training there are those of its own parameters alone. Experts are stacked by global number: a
    rank's experts are a contiguous range of the logical tensor [E, …].
    Without ZeRO all ranks hold copies and the first one owns them.
    """
    _create_moments(engine)
    updates = int(next(iter(_inner(engine).state.values()))["step"].item())
    return ShardedState(_list_fragments(engine), updates)


def _list_fragments(engine: Engine) -> list[Fragment]:
    mesh = engine.mesh
    fragments, table = [], engine.model.parameter_table()
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        offset, pieces = _local_pieces(engine, parameter)
        first_copy, shard = mesh.is_main, engine.ternary_shard(parameter)
        if shard is not None:
            shape = shard.logical
            offset += shard.start
            pieces = {part: values.view(-1)[: shard.count] for part, values in pieces.items()}
        if table[name].routed:
            local = engine.model.placement.local
            offset += local.start * (torch.Size(shape).numel() // len(local))
            shape = (engine.config.model.experts.num_experts, *shape[1:])
            first_copy = mesh.rank < mesh.expert_parallel
        owned = engine.stage > 0 or first_copy
        fragments += [
            Fragment(f"{name}/{part}", shape, offset, values.view(-1), owned) for part, values in pieces.items()
        ]
    fragments += [
        Fragment(name, tuple(values.shape), 0, values.view(-1), mesh.is_main)
        for name, values in ({} if engine.is_adapter else engine.model.routers.named()).items()
    ]
    return fragments


def sync_working_copy(engine: Engine, updates: int) -> None:
    """Refresh the working copy after fragments were overwritten, and set AdamW's counter. Collective."""
    engine.weights_changed()
    optimizer, inner = engine.optimizer, _inner(engine)
    for state in inner.state.values():
        state["step"].fill_(updates)
    if engine.stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    elif engine.stage > 0:
        optimizer.update_lp_params()
    elif optimizer is not inner:
        for working, master in _unsharded_masters(optimizer):
            working.data.copy_(master.data)


def _inner(engine: Engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _unsharded_masters(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for working, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(working, masters, strict=True)


def _create_moments(engine: Engine) -> None:
    """AdamW makes its moments in its first step; a checkpoint may be loaded, or saved, before that."""
    optimizer, inner = engine.optimizer, _inner(engine)
    if engine.stage == 3:
        masters = list(optimizer.fp32_partitioned_groups_flat)
    else:
        masters = [p for group in inner.param_groups for p in group["params"]]
    for master in masters:
        if "exp_avg" not in inner.state[master]:
            counter = torch.zeros((), device=master.device if engine.mesh.device.type == "cuda" else "cpu")
            inner.state[master] = {"step": counter} | {key: torch.zeros_like(master.data) for key in MOMENTS}
    if engine.stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _local_pieces(engine: Engine, parameter: Any) -> tuple[int, dict[str, Tensor]]:
    """Offset in the (local) parameter of this rank's piece, and the piece of each part; empty where there is none."""
    if engine.stage == 0:
        inner = _inner(engine)
        master = parameter
        if engine.optimizer is not inner:
            master = next(m for w, m in _unsharded_masters(engine.optimizer) if w is parameter)
        return 0, {"master": master.detach()} | {key: inner.state[master][key] for key in MOMENTS}
    if engine.stage == 3:
        start = parameter.ds_zero_partition_rank * parameter.ds_tensor.ds_numel
        count = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))
        whole = {"master": safe_get_local_fp32_param(parameter)}
        whole |= {key: safe_get_local_optimizer_state(parameter, key) for key in MOMENTS}
        return min(start, parameter.ds_numel), {
            part: values.detach().narrow(0, 0, count) for part, values in whole.items()
        }
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, {part: torch.empty(0, device=engine.mesh.device) for part in ("master", *MOMENTS)}
    pieces = {"master": mapping.get_hp_fragment(None)} | {key: mapping.get_hp_fragment(key) for key in MOMENTS}
    return mapping.lp_fragment_address.start, {part: values.detach() for part, values in pieces.items()}
