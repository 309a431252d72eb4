"""Plan of a growth: what turns one model into another, from the difference of their configurations.

Three things can grow, also at the same time: dense layers become mixtures (sparse upcycling, arXiv 2212.05055), E
routed experts become m·E (with virtual groups, arXiv 2410.07524), and a grid of G intervals becomes one of m·G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kabrn_dist.config import ModelConfig
from kabrn_dist.config.model_changes import TRAINING_KEYS, flatten_model
from kabrn_dist.model.experts.registry import EXPERT_TYPES
from kabrn_dist.utils.errors import UserError

FUNCTION_KEYS = sorted({key for experts in EXPERT_TYPES.values() for key in experts.function_keys})
FIXED_KEYS = (
    "vocab_size",
    "hidden_size",
    "layers",
    "short_conv_size",
    "retention.num_heads",
    "retention.key_dim",
    "retention.value_dim",
    "experts.type",
)
GROWING_KEYS = {
    f"experts.{key}"
    for key in (
        "num_experts",
        "expert_hidden_size",
        "dense_hidden_size",
        "moe_layer_interval",
        "num_dense_layers",
        "num_shared_experts",
        *FUNCTION_KEYS,
    )
}
ROUTING_KEYS = {"experts.top_k", "router.score_func", "router.norm_topk_prob", "router.n_group", "router.topk_group"}


@dataclass(frozen=True)
class GrowthPlan:
    """Changes between two models.

    Attributes:
        old: Model to start from.
        new: Model to grow.
        upcycled_layers: Layers whose dense feed-forward becomes a mixture.
        copied_layers: Layers that had a mixture, whose experts are copied.
        copies: Routed experts made from each one in `copied_layers`.
        changes: Other keys that change what the same weights compute, as `key old → new`.
    """

    old: ModelConfig
    new: ModelConfig
    upcycled_layers: tuple[int, ...]
    copied_layers: tuple[int, ...]
    copies: int
    changes: tuple[str, ...]

    @property
    def refines_grids(self) -> bool:
        """True if grids become finer."""
        return (
            "grid_size" in EXPERT_TYPES[self.new.experts.type].function_keys
            and self.new.experts.grid_size > self.old.experts.grid_size
        )

    @property
    def copies_per_token(self) -> int:
        """Copies of one expert that a token visits in `copied_layers`."""
        return self.new.experts.top_k // self.old.experts.top_k if self.copies > 1 else 1

    def disturbances(self, noise: float, redraw: float) -> list[str]:
        """Return the reasons for which the loss changes; none if it stays exactly as it was.

        Args:
            noise: Relative standard deviation of the noise on copies.
            redraw: Fraction of the copies' hidden units that are drawn again.
        """
        reasons = [f"{change} (another function of the same weights)" for change in self.changes]
        if self.copies > 1 and noise:
            reasons.append(f"noise of {noise:g} on the copies")
        if (self.copies > 1 or self.upcycled_layers) and redraw:
            reasons.append(f"{redraw:.0%} of the copies' hidden units are drawn again")
        if self.refines_grids and self.new.quantize:
            reasons.append("the coefficients of the finer grid are quantized again")
        return reasons


def make_growth_plan(old: ModelConfig, new: ModelConfig) -> GrowthPlan:
    """Return what turns the model `old` into `new`.

    Raises:
        UserError: if growing cannot do it, or not without changing the loss; names the key, both values and a remedy.
    """
    before, after = flatten_model(old), flatten_model(new)
    for key in FIXED_KEYS:
        _same(key, before[key], after[key])
    _check_functions(old, new)
    had, has = set(old.moe_layers), set(new.moe_layers)
    _check_layers(old, new, had, has)
    kept, upcycled = tuple(sorted(had & has)), tuple(sorted(has - had))
    if upcycled:
        _check_upcycling(old, new, upcycled)
    copies = _count_copies(old, new) if kept else 1
    if copies > 1:
        _check_copies(old, new, copies)
    free = TRAINING_KEYS | GROWING_KEYS | (ROUTING_KEYS if copies > 1 or not kept else set())
    changes = (f"model.{key} {before[key]} → {after[key]}" for key in after if before[key] != after[key])
    return GrowthPlan(old, new, upcycled, kept, copies, tuple(c for c in changes if c.split()[0][6:] not in free))


def _check_functions(old: ModelConfig, new: ModelConfig) -> None:
    for key in EXPERT_TYPES[new.experts.type].function_keys:
        then, now = getattr(old.experts, key), getattr(new.experts, key)
        if key != "grid_size":
            _same(f"experts.{key}", then, now)
        elif now % then:
            raise UserError(
                f"{_differs('experts.grid_size', then, now)}, whose knots do not include the old ones; "
                f"set it to {then}, {2 * then}, {3 * then} or another multiple"
            )


def _check_layers(old: ModelConfig, new: ModelConfig, had: set[int], has: set[int]) -> None:
    if lost := sorted(had - has):
        raise UserError(
            f"layers {_join(lost)} had a mixture and would become dense with model.experts.moe_layer_interval "
            f"{new.experts.moe_layer_interval} and num_dense_layers {new.experts.num_dense_layers}; growing only turns "
            f"dense layers into mixtures: set them back to {old.experts.moe_layer_interval} and "
            f"{old.experts.num_dense_layers}"
        )
    if len(had | has) < len(new.layers):
        _same("experts.dense_hidden_size", old.dense_hidden_size, new.dense_hidden_size)
    if had:
        _same("experts.expert_hidden_size", old.experts.expert_hidden_size, new.experts.expert_hidden_size)
        _same("experts.num_shared_experts", old.experts.num_shared_experts, new.experts.num_shared_experts)


def _check_upcycling(old: ModelConfig, new: ModelConfig, layers: tuple[int, ...]) -> None:
    if new.experts.expert_hidden_size != old.dense_hidden_size:
        raise UserError(
            f"model.experts.expert_hidden_size {new.experts.expert_hidden_size} is not the hidden size "
            f"{old.dense_hidden_size} of the dense layers {_join(layers)}, which experts are copied from; "
            f"set it to {old.dense_hidden_size}"
        )
    if not new.router.norm_topk_prob:
        raise UserError(
            "model.router.norm_topk_prob false does not make the weights of a token's experts sum to 1, so copies of a "
            "dense layer would not add up to it; set it to true"
        )


def _count_copies(old: ModelConfig, new: ModelConfig) -> int:
    then, now = old.experts.num_experts, new.experts.num_experts
    if now % then:
        raise UserError(
            f"{_differs('experts.num_experts', then, now)}, but each expert is copied equally often; "
            f"set it to {then}, {2 * then}, {3 * then} or another multiple"
        )
    return now // then


def _check_copies(old: ModelConfig, new: ModelConfig, copies: int) -> None:
    """Refuse a routing in which copies of an expert displace other experts, or do not add up to it.

    Copies have equal scores. Either a token visits all copies of its experts, which split their weight, or the copies
    form virtual groups, each a complete set of experts, and the token visits one group (arXiv 2410.07524).
    """
    for key in ("score_func", "norm_topk_prob"):
        _same(f"router.{key}", getattr(old.router, key), getattr(new.router, key))
    (old_groups, old_most), limit = _limit(old), _limit(new)
    k, top_k = old.experts.top_k, new.experts.top_k
    # Without norm_topk_prob, copies split a softmax score, and each has the whole sigmoid score.
    splits, whole = (new.router.norm_topk_prob or new.router.score_func == score for score in ("softmax", "sigmoid"))
    all_limit = (copies * old_groups, copies * old_most) if old_groups > 1 else (1, 1)
    if splits and (top_k, limit) == (copies * k, all_limit):
        return
    if whole and top_k == k and old_most == 1 and limit in ((copies * old_groups, 1), (1, 1))[: 2 if k == 1 else 1]:
        return
    ways = []
    if splits:
        limited = f"n_group {all_limit[0]} and topk_group {all_limit[1]}" if old_groups > 1 else "no group limit"
        ways.append(f"model.experts.top_k {copies * k} with {limited} (a token visits all copies)")
    if whole and old_most == 1:
        ways.append(f"top_k {k} with router.n_group {copies * old_groups} and topk_group 1 (it visits one copy)")
    raise UserError(
        f"model.experts.num_experts {old.experts.num_experts} → {new.experts.num_experts} copies each expert {copies} "
        f"times, and with top_k {k} → {top_k}, router.n_group {new.router.n_group} and topk_group "
        f"{new.router.topk_group or 'null'} the copies do not add up to the expert; "
        f"{'use ' + ', or '.join(ways) if ways else 'no routing makes them add up'}"
    )


def _limit(model: ModelConfig) -> tuple[int, int]:
    """Groups, and how many of them the experts of a token may come from; 1, 1 if that is not limited."""
    groups, most = model.router.n_group, model.router.topk_group
    return (1, 1) if most is None or most == groups else (groups, most)


def _same(key: str, then: Any, now: Any) -> None:
    if then != now:
        raise UserError(
            f"{_differs(key, then, now)}; growing can only multiply model.experts.num_experts and "
            f"model.experts.grid_size and turn dense layers into mixtures: set it to {then}, or train from scratch"
        )


def _differs(key: str, then: Any, now: Any) -> str:
    return f"model.{key} is {then} in the run to start from and {now} here"


def _join(numbers: Any) -> str:
    return ", ".join(map(str, numbers))
