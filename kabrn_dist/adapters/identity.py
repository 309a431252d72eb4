"""What is said where an adapter and a model do not belong together."""

from __future__ import annotations

from kabrn_dist.adapters.adapter import AdapterInfo
from kabrn_dist.utils.errors import UserError

HASH_DIGITS = 12


def refuse_base(model: str, info: AdapterInfo, found: str, expected: str = "") -> UserError:
    """Return the error for a model that an adapter was not trained on.

    Args:
        model: The model, as it is named to people.
        info: Of the adapter.
        found: `CodesHash` of the model.
        expected: What it should be; by default that of the adapter's base.
    """
    base = f", {info.base_name}," if info.base_name else ""
    return UserError(
        f"{model}: its codes have sha256 {found[:HASH_DIGITS]}…, and adapter {info.name!r} is for those of "
        f"{(expected or info.base_sha256)[:HASH_DIGITS]}…; name the model that it was trained on{base} "
        "or an adapter of this one"
    )
