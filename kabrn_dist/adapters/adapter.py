"""An adapter in memory: low-rank factors, flipped ternary codes, or initial states, and the model they belong to.

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

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

AdapterMethod = Literal["lora", "ternary_lora", "state"]


class LowRankFactors(NamedTuple):
    """A product of two thin matrices that is added to a matrix.

    Attributes:
        a: [E,R,I] fp32, read by the quantized input.
        b: [E,O,R] fp32, with all factors (alpha, rank and scale) in it: W·x becomes W·x + B·(A·x).
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]


class CodePatch(NamedTuple):
    """Ternary codes of a parameter that differ from the base model's, and the scales that belong to them.

    Attributes:
        shape: [E,O,I] of the parameter.
        places: int64, ascending, in the flattened parameter.
        steps: uint8, 1 or 2, for each place: the new code is the old one plus so many, in the cycle −1 → 0 → 1 → −1.
        scales: fp32 [E,S], after the change.
        base_scales: fp32 [E,S], before it.
    """

    shape: tuple[int, int, int]
    places: NDArray[np.int64]
    steps: NDArray[np.uint8]
    scales: NDArray[np.float32]
    base_scales: NDArray[np.float32]


class StateFactors(NamedTuple):
    """The initial state Σ_r key[h,r] ⊗ value[h,r] of a layer of retention.

    Attributes:
        key: [H,R,K] fp32.
        value: [H,R,V] fp32.
    """

    key: NDArray[np.float32]
    value: NDArray[np.float32]

    def matrix(self) -> NDArray[np.float32]:
        """Return the state [H,K,V], summed in fp64 and rounded once, so that it is the same bits everywhere."""
        return np.einsum("hrk,hrv->hkv", self.key.astype(np.float64), self.value.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter says about itself.

    Attributes:
        name: Name for people, such as that of the run.
        method: How it was trained, which says what it holds.
        rank: R of its factors.
        alpha: Scaling of the factors in training, alpha / rank.
        targets: What was trained, as in `finetune.targets`.
        base_sha256: `hash_codes` of the model that it was trained on.
        result_sha256: The same of the model with a patch applied; "" for other methods.
        steps: Optimizer steps that it was trained for.
        base_name: Name of the model that it was trained on, for people and for PEFT.
    """

    name: str
    method: AdapterMethod
    rank: int
    alpha: float
    targets: tuple[str, ...]
    base_sha256: str
    result_sha256: str = ""
    steps: int = 0
    base_name: str = ""


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        info: What it says about itself.
        low_ranks: Factors by the name of the parameter they are added to; empty unless the method is "lora".
        patches: Flipped codes by the name of the parameter; empty unless the method is "ternary_lora".
        states: Initial states by the number of the layer; empty unless the method is "state".
    """

    info: AdapterInfo
    low_ranks: dict[str, LowRankFactors] = field(default_factory=dict)
    patches: dict[str, CodePatch] = field(default_factory=dict)
    states: dict[int, StateFactors] = field(default_factory=dict)
