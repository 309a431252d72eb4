"""An adapter that is trained beside a frozen model, and what it is as a file.

Shapes: as in adapters/adapter.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kabrn_dist.adapters.adapter import Adapter, AdapterInfo, LowRankFactors, StateFactors
from kabrn_dist.model.adapter import (
    AdapterSpec,
    adapter_parameters,
    add_adapter,
    find_targets,
    trained_low_ranks,
    trained_states,
)
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.retention import STATE_KEY, STATE_VALUE
from kabrn_dist.ops.low_rank import A_SUFFIX, B_SUFFIX, LowRankModule
from kabrn_dist.utils.errors import UserError

# Adam's steps have about the size of the learning rate, whatever the gradient's.
LEARNING_RATES = {"lora": 0.005, "state": 0.2}


class TrainableAdapter:
    """Registers the parameters of an adapter in a model, which is frozen; they change nothing until they are trained.

    Args:
        model: The model.
        info: What the adapter says about itself.
        seed: Of the random numbers that its factors begin with.

    Raises:
        UserError: for a method that cannot be trained so, and targets that are none.
    """

    def __init__(self, model: MixKABRN, info: AdapterInfo, seed: int = 0) -> None:
        if info.method not in LEARNING_RATES:
            raise UserError(
                f"adapter {info.name}: flipped codes cannot be trained further in a chat; give it with --adapter, and "
                "learn into another folder with --out"
            )
        spec = AdapterSpec(info.method, info.rank, info.alpha, info.targets)
        find_targets(model, spec)
        model.requires_grad_(False)
        add_adapter(model, spec, seed)
        self._model, self.info = model, info
        self._first = self.copy()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for _, parameter in adapter_parameters(self._model)]

    @property
    def learning_rate(self) -> float:
        """The rate that suits the method."""
        return LEARNING_RATES[self.info.method]

    def copy(self) -> list[Tensor]:
        """Return a copy of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, values: list[Tensor] | None) -> None:
        """Give the parameters values that `copy` returned; None: those that they began with."""
        for parameter, value in zip(self.parameters, self._first if values is None else values, strict=True):
            parameter.copy_(value)

    def adapter(self, more_steps: int = 0) -> Adapter:
        """Return the adapter as it is now, after so many steps more than it has had."""
        self.info = replace(self.info, steps=self.info.steps + more_steps)
        low_ranks = {
            name: LowRankFactors(_to_numpy(factors.a), _to_numpy(factors.b))
            for name, factors in trained_low_ranks(self._model).items()
        }
        states = {
            layer: StateFactors(_to_numpy(factors.key), _to_numpy(factors.value))
            for layer, factors in trained_states(self._model).items()
        }
        return Adapter(self.info, low_ranks=low_ranks, states=states)

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Continue from an adapter of the same method, rank and targets.

        Raises:
            UserError: for factors at other places, or of other shapes.
        """
        wanted = {info.name: parameter for info, parameter in adapter_parameters(self._model)}
        found = {**self._list_factors(adapter.low_ranks), **_list_states(adapter.states)}
        if found.keys() != wanted.keys():
            raise UserError(
                f"adapter {adapter.info.name}: has factors at other places than its targets say; use another one"
            )
        for name, parameter in wanted.items():
            if found[name].size != parameter.numel():
                raise UserError(
                    f"adapter {adapter.info.name}: {name} has shape {found[name].shape}, the model has room for "
                    f"{tuple(parameter.shape)}; use an adapter of this model"
                )
            parameter.copy_(torch.from_numpy(found[name]).view_as(parameter))
        self.info = adapter.info

    def _list_factors(self, low_ranks: Mapping[str, LowRankFactors]) -> dict[str, Any]:
        """Parameters of low-rank factors, B without the factors that the model multiplies it by."""
        found: dict[str, Any] = {}
        for name, factors in low_ranks.items():
            place, _, leaf = name.rpartition(".")
            try:
                owner = self._model.get_submodule(place)
            except AttributeError:
                owner = None
            if not isinstance(owner, LowRankModule) or leaf not in owner.low_rank_scales:
                # Named, so that it is found to be at another place.
                found[name] = factors.a
                continue
            scale = owner.low_rank_scales[leaf].cpu().numpy()
            found |= {name + A_SUFFIX: factors.a, name + B_SUFFIX: (factors.b / scale).astype(np.float32)}
        return found


def _list_states(states: Mapping[int, StateFactors]) -> dict[str, Any]:
    return {
        f"blocks.{layer}.mixer.{leaf}": values
        for layer, factors in states.items()
        for leaf, values in zip((STATE_KEY, STATE_VALUE), factors, strict=True)
    }


def _to_numpy(tensor: Tensor) -> Any:
    return tensor.cpu().numpy().copy()
