"""What growing does to a model, from the difference of two configurations, and what it refuses.

Three things can grow, at once if need be: dense layers become mixtures (sparse upcycling, arXiv 2212.05055), E routed
experts become m·E (with virtual groups, arXiv 2410.07524), a grid of G intervals becomes one of m·G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kabrn_dist.config import Model
from kabrn_dist.utils.errors import UserError

# Settings of functions on a grid or in groups, and the forms that have them.
FUNCTIONS = {
    "groups": ("rational", "chebyshev"),
    "grid": ("hat", "bspline"),
    "degree": ("bspline",),
    "range": ("chebyshev", "hat", "bspline"),
}
KEPT = (
    "vocabulary",
    "width",
    "layers",
    "convolution",
    "retention.heads",
    "retention.key_width",
    "retention.value_width",
    "experts.form",
)
GROWN = {f"experts.{key}" for key in ("routed", "hidden", "dense_hidden", "every", "first_dense", "shared", *FUNCTIONS)}
ROUTING = {"experts.top_k", "router.score", "router.renormalise", "router.groups", "router.groups_per_token"}
# They say how training goes on, not what the model computes.
SILENT = {
    "activations",
    "retention.chunk",
    *(f"router.{key}" for key in ("bias_rate", "balance", "global_balance", "z", "jitter")),
}


@dataclass(frozen=True)
class Plan:
    """What happens between two models.

    Attributes:
        upcycled: layers whose dense feed-forward becomes a mixture; kept: layers that had a mixture.
        copies: routed experts made of each one in `kept` layers.
        changes: settings that make another function of the same tensors, as `key old → new`.
    """

    old: Model
    new: Model
    upcycled: tuple[int, ...]
    kept: tuple[int, ...]
    copies: int
    changes: tuple[str, ...]

    @property
    def refined(self) -> bool:
        """True where grids become finer."""
        return self.new.experts.form in FUNCTIONS["grid"] and self.new.experts.grid > self.old.experts.grid

    @property
    def visited(self) -> int:
        """Copies of one expert that a token visits in `kept` layers."""
        return self.new.experts.top_k // self.old.experts.top_k if self.copies > 1 else 1

    def disturbances(self, noise: float, redraw: float) -> list[str]:
        """Why the loss is not exactly what it was; empty where it is."""
        found = [f"{change} (another function of the same weights)" for change in self.changes]
        if self.copies > 1 and noise:
            found.append(f"noise of {noise:g} on the copies")
        if (self.copies > 1 or self.upcycled) and redraw:
            found.append(f"{redraw:.0%} of the copies' hidden units are drawn anew")
        if self.refined and self.new.quantise:
            found.append("ternary codes of the finer grid are taken anew")
        return found


def make_plan(old: Model, new: Model) -> Plan:
    """What turns `old` into `new`.

    Raises:
        UserError: where nothing here does, or not without changing the loss; names the key, both values, the remedy.
    """
    before, after = _flatten(old), _flatten(new)
    for key in KEPT:
        _same(key, before[key], after[key])
    _check_functions(old, new)
    had, has = set(old.mixture_layers), set(new.mixture_layers)
    _check_layers(old, new, had, has)
    kept, upcycled = tuple(sorted(had & has)), tuple(sorted(has - had))
    if upcycled:
        _check_upcycling(old, new, upcycled)
    copies = _count_copies(old, new) if kept else 1
    if copies > 1:
        _check_copies(old, new, copies)
    free = SILENT | GROWN | (ROUTING if copies > 1 or not kept else set())
    changes = (f"model.{key} {before[key]} → {after[key]}" for key in after if before[key] != after[key])
    return Plan(old, new, upcycled, kept, copies, tuple(c for c in changes if c.split()[0][6:] not in free))


def _check_functions(old: Model, new: Model) -> None:
    for key, forms in FUNCTIONS.items():
        then, now = getattr(old.experts, key), getattr(new.experts, key)
        if new.experts.form not in forms:
            continue
        if key != "grid":
            _same(f"experts.{key}", then, now)
        elif now % then:
            raise UserError(
                f"{_differs('experts.grid', then, now)}, whose knots do not hold the old ones; "
                f"use {then}, {2 * then}, {3 * then} or another multiple"
            )


def _check_layers(old: Model, new: Model, had: set[int], has: set[int]) -> None:
    if lost := sorted(had - has):
        raise UserError(
            f"layers {_join(lost)} had a mixture and would have a dense feed-forward by model.experts.every "
            f"{new.experts.every} and first_dense {new.experts.first_dense}; growing goes the other way only: set them "
            f"back to {old.experts.every} and {old.experts.first_dense}"
        )
    if len(had | has) < len(new.layers):
        _same("experts.dense_hidden", old.dense_hidden, new.dense_hidden)
    if had:
        _same("experts.hidden", old.experts.hidden, new.experts.hidden)
        _same("experts.shared", old.experts.shared, new.experts.shared)


def _check_upcycling(old: Model, new: Model, layers: tuple[int, ...]) -> None:
    if new.experts.hidden != old.dense_hidden:
        raise UserError(
            f"model.experts.hidden {new.experts.hidden} is not the hidden width {old.dense_hidden} of the dense layers "
            f"{_join(layers)}, which experts are copied from; set it to {old.dense_hidden}"
        )
    if not new.router.renormalise:
        raise UserError(
            "model.router.renormalise false lets the weights of a token's experts sum to anything, so copies of a "
            "dense layer would not add up to it; set it to true"
        )


def _count_copies(old: Model, new: Model) -> int:
    then, now = old.experts.routed, new.experts.routed
    if now % then:
        raise UserError(
            f"{_differs('experts.routed', then, now)}, and each expert is copied equally often; "
            f"use {then}, {2 * then}, {3 * then} or another multiple"
        )
    return now // then


def _check_copies(old: Model, new: Model, copies: int) -> None:
    """Refuse a routing in which copies of an expert crowd others out of a token's top k, or do not add up to it.

    Copies score alike. Either a token visits all copies of its experts, which share their weight, or the copies lie in
    virtual groups, each a whole set of the experts, of which it visits one (arXiv 2410.07524).
    """
    for key in ("score", "renormalise"):
        _same(f"router.{key}", getattr(old.router, key), getattr(new.router, key))
    (old_groups, old_most), limit = _limit(old), _limit(new)
    k, top_k = old.experts.top_k, new.experts.top_k
    # Without renormalisation copies split a softmax score, and each has a sigmoid score whole.
    splits, whole = (new.router.renormalise or new.router.score == score for score in ("softmax", "sigmoid"))
    all_limit = (copies * old_groups, copies * old_most) if old_groups > 1 else (1, 1)
    if splits and (top_k, limit) == (copies * k, all_limit):
        return
    if whole and top_k == k and old_most == 1 and limit in ((copies * old_groups, 1), (1, 1))[: 2 if k == 1 else 1]:
        return
    ways = []
    if splits:
        limited = f"groups {all_limit[0]} and groups_per_token {all_limit[1]}" if old_groups > 1 else "no group limit"
        ways.append(f"model.experts.top_k {copies * k} with {limited} (a token visits all copies)")
    if whole and old_most == 1:
        ways.append(f"top_k {k} with router.groups {copies * old_groups} and groups_per_token 1 (it visits one copy)")
    raise UserError(
        f"model.experts.routed {old.experts.routed} → {new.experts.routed} copies each expert {copies} times, and with "
        f"top_k {k} → {top_k}, router.groups {new.router.groups} and groups_per_token "
        f"{new.router.groups_per_token or 'null'} the copies do not add up to what they were; "
        f"{'use ' + ', or '.join(ways) if ways else 'no routing lets them'}"
    )


def _limit(model: Model) -> tuple[int, int]:
    """Groups, and how many a token's experts may come from; 1, 1 where that is no limit."""
    groups, most = model.router.groups, model.router.groups_per_token
    return (1, 1) if most is None or most == groups else (groups, most)


def _same(key: str, then: Any, now: Any) -> None:
    if then != now:
        raise UserError(
            f"{_differs(key, then, now)}; growing can multiply model.experts.routed and model.experts.grid and turn "
            f"dense layers into mixtures, nothing else: set it to {then}, or train anew"
        )


def _differs(key: str, then: Any, now: Any) -> str:
    return f"model.{key} is {then} in the run to start from and {now} here"


def _flatten(model: Model) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in model.model_dump(mode="json").items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _join(numbers: Any) -> str:
    return ", ".join(map(str, numbers))
