"""Adapters in a model: frozen weights, low-rank factors beside matrices, initial states of retention.

Shapes:
    E: matrices of a parameter (experts); 1 for the matrices of mixers.
    O: output features.
    I: input features.
    R: rank.
    H: heads.
    K: key size of a head.
    V: value size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kabrn_dist.model.adapter_targets import match_targets
from kabrn_dist.model.experts.base import Experts
from kabrn_dist.model.fixed_codes import FixedCodes, MergedCodes
from kabrn_dist.model.init import draw_experts, draw_normal
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.parameters import ParameterInfo
from kabrn_dist.model.retention import STATE_KEY, STATE_VALUE, Retention
from kabrn_dist.ops.low_rank import A_SUFFIX, B_SUFFIX, LowRank, LowRankModule
from kabrn_dist.ops.weight_quant import TernaryMatrices, TernaryModule, absmean_scales
from kabrn_dist.utils.errors import UserError


class AdapterSpec(NamedTuple):
    """What is trained beside a frozen model; see the section `finetune` of a configuration.

    Attributes:
        method: how.
        rank: R of factors and of initial states.
        alpha: factors are multiplied by alpha / rank and by the scale of their matrix.
        targets: which matrices get factors.
    """

    method: Literal["lora", "ternary_lora", "state"]
    rank: int
    alpha: float
    targets: tuple[str, ...]


class InitialStateFactors(NamedTuple):
    """Factors of a layer's initial state Σ_r key[h,r] ⊗ value[h,r].

    Attributes:
        key: [H,R,K].
        value: [H,R,V].
    """

    key: Tensor
    value: Tensor


def find_targets(model: MixKABRN, spec: AdapterSpec) -> tuple[str, ...]:
    """Return the names of the parameters that get factors, in the model's order; none for the method `state`.

    Raises:
        UserError: for targets that match nothing or that the method cannot train, for a rank that is larger than a
            matrix, and for initial states of a model without retention.
    """
    if spec.method == "state":
        _check_state_rank(model, spec.rank)
        return ()
    if spec.method == "ternary_lora" and not model.config.quantize:
        raise UserError(
            "finetune.method: ternary_lora flips ternary codes, and the base's matrices are plain (model.quantize: "
            "false); set finetune.method to lora"
        )
    names = match_targets(model.parameter_table(), spec.targets, ternary=spec.method == "ternary_lora")
    for name in names:
        outputs, inputs = model.get_parameter(name).shape[-2:]
        if spec.rank > min(outputs, inputs):
            raise UserError(
                f"finetune.rank: {spec.rank} is larger than {name!r}, a matrix of {outputs} × {inputs}; set it to "
                f"{min(outputs, inputs)} or less, or leave this matrix out of finetune.targets"
            )
    return names


def freeze_base(model: MixKABRN) -> None:
    """Stop training all parameters, and fix the ternary codes to what they are now, whatever dtype is cast to later."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, TernaryModule):
            for leaf in module.stds:
                with torch.no_grad():
                    found = module.matrices(leaf)
                if found.packed is not None:
                    module.sources[leaf] = FixedCodes(found)


def add_adapter(model: MixKABRN, spec: AdapterSpec, seed: int) -> None:
    """Register and draw the parameters of an adapter, in a model with its whole weights that `freeze_base` has frozen.

    They are drawn from `seed` and their names, experts by their global numbers, the same on any number of ranks. The
    result of the model does not change: B of the factors, and the values of initial states, are zeros.

    Args:
        model: whose result the adapter changes when it is trained.
        spec: what is trained.
        seed: of the random numbers.

    Raises:
        UserError: see `find_targets`.
    """
    names = find_targets(model, spec)
    if spec.method == "state":
        for name, mixer in _retention_layers(model).values():
            _add_state(mixer, name, spec.rank, seed)
    for name in names:
        owner, leaf = _find_owner(model, name)
        scale = spec.alpha / spec.rank * _mean_scale(owner, leaf)
        _add_factors(owner, name, leaf, spec.rank, seed)
        if spec.method == "ternary_lora":
            _merge_with_factors(owner, leaf, scale)
        else:
            owner.low_rank_scales[leaf] = scale


def set_low_ranks(model: MixKABRN, low_ranks: Mapping[str, LowRank]) -> None:
    """Put fixed factors beside matrices, in the place of earlier fixed ones.

    Args:
        model: changed in place.
        low_ranks: by the name of the parameter; an empty mapping takes all away.

    Raises:
        UserError: for a name that is no matrix of the model, or factors of another shape.
    """
    table, device = model.parameter_table(), model.embedding.weight.device
    for name, factors in low_ranks.items():
        if name not in table or table[name].role not in ("matrix", "router", "head"):
            raise UserError(f"adapter: {name!r} is no matrix of this model; use the adapter of this model")
        shape = model.get_parameter(name).shape
        matrices, outputs, inputs = shape if len(shape) == 3 else (1, *shape)
        rank = factors.a.shape[1] if factors.a.ndim == 3 else 0
        if factors.a.shape != (matrices, rank, inputs) or factors.b.shape != (matrices, outputs, rank):
            raise UserError(
                f"adapter: the factors of {name!r} are {tuple(factors.a.shape)} and {tuple(factors.b.shape)}, for a "
                f"parameter of {tuple(shape)}; use the adapter of this model"
            )
    for module in model.modules():
        if isinstance(module, LowRankModule):
            module.fixed_low_ranks = {}
    for name, factors in low_ranks.items():
        owner, leaf = _find_owner(model, name)
        owner.fixed_low_ranks[leaf] = LowRank(*(part.detach().to(device) for part in factors))


def set_initial_states(model: MixKABRN, states: Mapping[int, Tensor]) -> None:
    """Set the states that retention begins documents with, in the place of earlier fixed ones.

    Args:
        model: changed in place.
        states: by the number of the layer, [H,K,V] fp32; an empty mapping takes all away.

    Raises:
        UserError: for a layer without retention, or a state of another shape.
    """
    layers, config = _retention_layers(model), model.config.retention
    shape = config.num_heads, config.key_dim, config.value_dim
    for layer, state in states.items():
        if layer not in layers or tuple(state.shape) != shape:
            raise UserError(
                f"adapter: an initial state {tuple(state.shape)} of layer {layer}; this model has states {shape} in "
                f"layers {sorted(layers)}; use the adapter of this model"
            )
    for layer, (_, mixer) in layers.items():
        given = states.get(layer)
        mixer.fixed_initial_state = None if given is None else given.detach().to(model.embedding.weight.device)


@torch.no_grad()
def merged_matrices(model: MixKABRN, name: str) -> TernaryMatrices:
    """Return the codes and scales of a ternary parameter that the forward pass multiplies by, merged with its factors.

    Args:
        model: of any method.
        name: of the parameter.
    """
    owner, leaf = _find_owner(model, name)
    assert isinstance(owner, TernaryModule), name
    return owner.matrices(leaf)


@torch.no_grad()
def trained_low_ranks(model: MixKABRN) -> dict[str, LowRank]:
    """Return the trained factors by the name of the parameter, with alpha, rank and scale in B, as they are now.

    Empty for ternary_lora, whose factors are merged with the latents; see `merged_matrices`.
    """
    found: dict[str, LowRank] = {}
    for name, info in model.parameter_table().items():
        if info.role in ("matrix", "router", "head"):
            owner, leaf = _find_owner(model, name)
            factors = owner.trained_low_rank(leaf)
            if factors is not None:
                found[name] = LowRank(*(part.detach().float() for part in factors))
    return found


def trained_states(model: MixKABRN) -> dict[int, InitialStateFactors]:
    """Return the factors of the trained initial states by the number of the layer, as they are now."""
    return {
        layer: InitialStateFactors(*(mixer.get_parameter(leaf).detach().float() for leaf in (STATE_KEY, STATE_VALUE)))
        for layer, (_, mixer) in _retention_layers(model).items()
        if mixer.trained_initial_state() is not None
    }


def adapter_parameters(model: MixKABRN) -> Iterator[tuple[ParameterInfo, nn.Parameter]]:
    """Yield the parameters of the adapter that is trained, in the order of `named_parameters()`."""
    table = model.parameter_table()
    for name, parameter in model.named_parameters():
        if table[name].role == "adapter":
            yield table[name], parameter


def _find_owner(model: MixKABRN, name: str) -> tuple[LowRankModule, str]:
    prefix, _, leaf = name.rpartition(".")
    owner = model.get_submodule(prefix)
    assert isinstance(owner, LowRankModule), name
    return owner, leaf


def _retention_layers(model: MixKABRN) -> dict[int, tuple[str, Retention]]:
    """Names and modules of the layers of retention, by their numbers."""
    mixers = {layer: block.mixer for layer, block in enumerate(model.blocks)}
    return {i: (f"blocks.{i}.mixer", mixer) for i, mixer in mixers.items() if isinstance(mixer, Retention)}


def _check_state_rank(model: MixKABRN, rank: int) -> None:
    config = model.config.retention
    if not _retention_layers(model):
        raise UserError(
            "finetune.method: state trains the initial states of retention, and the base has no layer of it; set "
            "finetune.method to lora"
        )
    if rank > min(config.key_dim, config.value_dim):
        raise UserError(
            f"finetune.rank: {rank} is larger than a state of {config.key_dim} × {config.value_dim}; set it to "
            f"{min(config.key_dim, config.value_dim)} or less"
        )


@torch.no_grad()
def _mean_scale(owner: LowRankModule, leaf: str) -> Tensor:
    """[E,1,1] fp32: the mean of a matrix's scales, weighted by their rows, or of the magnitudes of a plain one."""
    matrices = owner.matrices(leaf) if isinstance(owner, TernaryModule) else None
    gamma = None if matrices is None else matrices.gamma
    if gamma is None:
        parameter = owner.get_parameter(leaf)
        gamma = absmean_scales((parameter if parameter.ndim == 3 else parameter[None]).detach())
    return gamma.double().mean(1, keepdim=True).to(gamma.dtype)


def _merge_with_factors(owner: LowRankModule, leaf: str, scale: Tensor) -> None:
    assert isinstance(owner, TernaryModule)
    parameter = owner.get_parameter(leaf).detach()
    latents = parameter if parameter.ndim == 3 else parameter[None]
    base = owner.sources[leaf].read(owner.get_parameter(leaf))
    owner.sources[leaf] = MergedCodes(owner, leaf, scale, latents, base, owner.quant.scale_group_size)


def _add_factors(owner: LowRankModule, name: str, leaf: str, rank: int, seed: int) -> None:
    weight = owner.get_parameter(leaf)
    *experts, outputs, inputs = weight.shape
    # The rows that A reads are normalized: A·x then begins with unit variance.
    std, drawn_name = inputs**-0.5, name + A_SUFFIX
    if isinstance(owner, Experts):
        a = draw_experts(seed, drawn_name, owner.expert_ids, (rank, inputs), std)
    else:
        a = draw_normal(seed, drawn_name, (rank, inputs), std)
    b = torch.zeros(*experts, outputs, rank)
    for suffix, values in ((A_SUFFIX, a), (B_SUFFIX, b)):
        owner.register_parameter(leaf + suffix, nn.Parameter(values.to(weight.device, _wide(weight))))


def _add_state(mixer: Retention, name: str, rank: int, seed: int) -> None:
    config, weight = mixer.config, mixer.output.out.weight
    # Keys that tokens write have a variance of about one.
    key = draw_normal(seed, f"{name}.{STATE_KEY}", (config.num_heads, rank, config.key_dim), 1.0)
    value = torch.zeros(config.num_heads, rank, config.value_dim)
    for leaf, values in ((STATE_KEY, key), (STATE_VALUE, value)):
        mixer.register_parameter(leaf, nn.Parameter(values.to(weight.device, _wide(weight))))


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
