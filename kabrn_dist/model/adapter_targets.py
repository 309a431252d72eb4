"""Which matrices of a model get low-rank factors: names of groups, of parts, and patterns of whole names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from kabrn_dist.model.parameters import ParameterInfo
from kabrn_dist.utils.errors import UserError

GROUPS: Mapping[str, Callable[[ParameterInfo], bool]] = {
    "mixer": lambda info: info.local_name.startswith("mixer."),
    "shared": lambda info: info.local_name.startswith("mixture.shared."),
    "routed": lambda info: info.local_name.startswith("mixture.routed."),
    "router": lambda info: info.role == "router",
    "head": lambda info: info.role == "head",
}
# Matrices that are plain in every model.
PLAIN_GROUPS = ("router", "head")


def match_targets(table: Mapping[str, ParameterInfo], targets: Iterable[str], ternary: bool) -> tuple[str, ...]:
    """Return the names of the matrices that the targets mean, in the order of the table.

    Args:
        table: of the model's parameters.
        targets: `mixer`, `shared`, `routed`, `router` or `head`; parts such as `query` or `down`; or patterns of whole
            names such as `blocks.3.*`, which mean routers and the head only where they name them.
        ternary: whether only ternary matrices can be targets.

    Raises:
        UserError: for a target that matches nothing, or only plain matrices where they cannot be targets.
    """
    candidates = [info for info in table.values() if info.role in ("matrix", "router", "head")]
    chosen: set[str] = set()
    for target in targets:
        matched = [info for info in candidates if _matches(info, target)]
        if not matched:
            raise UserError(
                f"finetune.targets: {target!r} matches no matrix of the base; {_suggest(target, candidates)}"
            )
        if ternary and all(info.role in PLAIN_GROUPS for info in matched):
            raise UserError(
                f"finetune.targets: {target!r} is not ternary, and ternary_lora flips ternary codes; leave it out, or "
                "set finetune.method to lora"
            )
        chosen |= {info.name for info in matched if not ternary or info.ternary}
    if not chosen:
        raise UserError("finetune.targets: names no matrix; set it to some of mixer, shared, routed")
    return tuple(info.name for info in candidates if info.name in chosen)


def _part(info: ParameterInfo) -> str:
    """The name of a matrix within its mixer or expert, such as `query` or `down`."""
    return info.name.removesuffix(".weight").rpartition(".")[2]


def _matches(info: ParameterInfo, target: str) -> bool:
    if target in GROUPS:
        return GROUPS[target](info)
    if target in (_part(info), info.name):
        return True
    if info.role in PLAIN_GROUPS and info.role not in target:
        return False
    return any(fnmatchcase(name, target) for name in (info.name, info.name.removesuffix(".weight")))


def _suggest(target: str, candidates: list[ParameterInfo]) -> str:
    words = [word for word in GROUPS if any(GROUPS[word](info) for info in candidates)]
    parts = list(dict.fromkeys(_part(info) for info in candidates if info.role == "matrix"))
    near = difflib.get_close_matches(target, [*words, *parts, *(info.name for info in candidates)], 3, 0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"use {', '.join(dict.fromkeys([*words, *parts]))}, or a pattern of whole names such as 'blocks.3.*'"
