"""Which examples are asked, and which ones precede them in a prompt: the same for every model."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

from kabrn_dist.evaluation.task import Example


def order_examples(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return examples in an order that only their ids and the seed decide.

    Files are often sorted by subject or difficulty: a limited number of examples is then none of a kind, and more of
    them contain the fewer.
    """
    return sorted(examples, key=lambda example: hash_number(f"{seed}/{example.id}"))


def select_shots(pool: Sequence[Example], example: Example, count: int) -> list[Example]:
    """Return the first examples of an ordered pool that are not the one to be answered.

    Prompts of a task hence begin alike.

    Args:
        pool: Examples with their answers, ordered.
        example: To be answered.
        count: How many there should be.
    """
    others = (other for other in pool if (other.id, other.record) != (example.id, example.record))
    return list(itertools.islice(others, count))


def hash_number(text: str) -> int:
    """Return a number from 0 to 2⁴⁸ − 1 that looks random, the same for a text on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big")
