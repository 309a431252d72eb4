"""What growing does to a model, from the difference of two configurations, and what it refuses.

Three things can grow, at once if need be: dense layers become mixtures (sparse upcycling, arXiv 2212.05055), E routed
experts become m·E (with virtual groups, arXiv 2410.07524), a grid of G intervals becomes one of m·G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kabrn_dist.config import ModelConfig
from kabrn_dist.utils.errors import UserError

# Settings of functions on a grid or in groups, and the forms that have them.
FUNCTION_KEYS = {
    "function_groups": ("rational", "chebyshev"),
    "grid_size": ("hat", "bspline"),
    "spline_order": ("bspline",),
    "grid_range": ("chebyshev", "hat", "bspline"),
}
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
# They say how training goes on, not what the model computes.
TRAINING_KEYS = {
    "activation_checkpointing",
    "retention.chunk_size",
    *(
        f"router.{key}"
        for key in ("bias_update_rate", "seq_aux_loss_weight", "global_aux_loss_weight", "z_loss_weight", "jitter_eps")
    ),
}


@dataclass(frozen=True)
class GrowthPlan:
    """What happens between two models.

    Attributes:
        upcycled: layers whose dense feed-forward becomes a mixture; kept: layers that had a mixture.
        copies: routed experts made of each one in `kept` layers.
        changes: settings that make another function of the same tensors, as `key old → new`.
    """

    old: ModelConfig
    new: ModelConfig
    upcycled_layers: tuple[int, ...]
    copied_layers: tuple[int, ...]
    copies: int
    changes: tuple[str, ...]

    @property
    def refines_grids(self) -> bool:
        """True where grids become finer."""
        return (
            self.new.experts.type in FUNCTION_KEYS["grid_size"]
            and self.new.experts.grid_size > self.old.experts.grid_size
        )

    @property
    def copies_per_token(self) -> int:
        """Copies of one expert that a token visits in `kept` layers."""
        return self.new.experts.top_k // self.old.experts.top_k if self.copies > 1 else 1

    def disturbances(self, noise: float, redraw: float) -> list[str]:
        """Why the loss is not exactly what it was; empty where it is."""
        found = [f"{change} (another function of the same weights)" for change in self.changes]
        if self.copies > 1 and noise:
            found.append(f"noise of {noise:g} on the copies")
        if (self.copies > 1 or self.upcycled_layers) and redraw:
            found.append(f"{redraw:.0%} of the copies' hidden units are drawn anew")
        if self.refines_grids and self.new.quantize:
            found.append("ternary codes of the finer grid are taken anew")
        return found


def make_growth_plan(old: ModelConfig, new: ModelConfig) -> GrowthPlan:
    """What turns `old` into `new`.

    Raises:
        UserError: where nothing here does, or not without changing the loss; names the key, both values, the remedy.
    """
    before, after = _flatten(old), _flatten(new)
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
    for key, forms in FUNCTION_KEYS.items():
        then, now = getattr(old.experts, key), getattr(new.experts, key)
        if new.experts.type not in forms:
            continue
        if key != "grid_size":
            _same(f"experts.{key}", then, now)
        elif now % then:
            raise UserError(
                f"{_differs('experts.grid_size', then, now)}, whose knots do not hold the old ones; "
                f"use {then}, {2 * then}, {3 * then} or another multiple"
            )


def _check_layers(old: ModelConfig, new: ModelConfig, had: set[int], has: set[int]) -> None:
    if lost := sorted(had - has):
        raise UserError(
            f"layers {_join(lost)} had a mixture and would have a dense feed-forward by model.experts.moe_layer_interval "
            f"{new.experts.moe_layer_interval} and num_dense_layers {new.experts.num_dense_layers}; growing goes the other way only: set them "
            f"back to {old.experts.moe_layer_interval} and {old.experts.num_dense_layers}"
        )
    if len(had | has) < len(new.layers):
        _same("experts.dense_hidden_size", old.dense_hidden_size, new.dense_hidden_size)
    if had:
        _same("experts.expert_hidden_size", old.experts.expert_hidden_size, new.experts.expert_hidden_size)
        _same("experts.num_shared_experts", old.experts.num_shared_experts, new.experts.num_shared_experts)


def _check_upcycling(old: ModelConfig, new: ModelConfig, layers: tuple[int, ...]) -> None:
    if new.experts.expert_hidden_size != old.dense_hidden_size:
        raise UserError(
            f"model.experts.expert_hidden_size {new.experts.expert_hidden_size} is not the hidden width {old.dense_hidden_size} of the dense layers "
            f"{_join(layers)}, which experts are copied from; set it to {old.dense_hidden_size}"
        )
    if not new.router.norm_topk_prob:
        raise UserError(
            "model.router.norm_topk_prob false lets the weights of a token's experts sum to anything, so copies of a "
            "dense layer would not add up to it; set it to true"
        )


def _count_copies(old: ModelConfig, new: ModelConfig) -> int:
    then, now = old.experts.num_experts, new.experts.num_experts
    if now % then:
        raise UserError(
            f"{_differs('experts.num_experts', then, now)}, and each expert is copied equally often; "
            f"use {then}, {2 * then}, {3 * then} or another multiple"
        )
    return now // then


def _check_copies(old: ModelConfig, new: ModelConfig, copies: int) -> None:
    """Refuse a routing in which copies of an expert crowd others out of a token's top k, or do not add up to it.

    Copies score alike. Either a token visits all copies of its experts, which share their weight, or the copies lie in
    virtual groups, each a whole set of the experts, of which it visits one (arXiv 2410.07524).
    """
    for key in ("score_func", "norm_topk_prob"):
        _same(f"router.{key}", getattr(old.router, key), getattr(new.router, key))
    (old_groups, old_most), limit = _limit(old), _limit(new)
    k, top_k = old.experts.top_k, new.experts.top_k
    # Without renormalisation copies split a softmax score, and each has a sigmoid score whole.
    splits, whole = (new.router.norm_topk_prob or new.router.score_func == score for score in ("softmax", "sigmoid"))
    all_limit = (copies * old_groups, copies * old_most) if old_groups > 1 else (1, 1)
    if splits and (top_k, limit) == (copies * k, all_limit):
        return
    if whole and top_k == k and old_most == 1 and limit in ((copies * old_groups, 1), (1, 1))[: 2 if k == 1 else 1]:
        return
    ways = []
    if splits:
        limited = f"groups {all_limit[0]} and topk_group {all_limit[1]}" if old_groups > 1 else "no group limit"
        ways.append(f"model.experts.top_k {copies * k} with {limited} (a token visits all copies)")
    if whole and old_most == 1:
        ways.append(f"top_k {k} with router.n_group {copies * old_groups} and topk_group 1 (it visits one copy)")
    raise UserError(
        f"model.experts.num_experts {old.experts.num_experts} → {new.experts.num_experts} copies each expert {copies} times, and with "
        f"top_k {k} → {top_k}, router.n_group {new.router.n_group} and topk_group "
        f"{new.router.topk_group or 'null'} the copies do not add up to what they were; "
        f"{'use ' + ', or '.join(ways) if ways else 'no routing lets them'}"
    )


def _limit(model: ModelConfig) -> tuple[int, int]:
    """Groups, and how many a token's experts may come from; 1, 1 where that is no limit."""
    groups, most = model.router.n_group, model.router.topk_group
    return (1, 1) if most is None or most == groups else (groups, most)


def _same(key: str, then: Any, now: Any) -> None:
    if then != now:
        raise UserError(
            f"{_differs(key, then, now)}; growing can multiply model.experts.num_experts and model.experts.grid_size and turn "
            f"dense layers into mixtures, nothing else: set it to {then}, or train anew"
        )


def _differs(key: str, then: Any, now: Any) -> str:
    return f"model.{key} is {then} in the run to start from and {now} here"


def _flatten(model: ModelConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in model.model_dump(mode="json").items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _join(numbers: Any) -> str:
    return ", ".join(map(str, numbers))
