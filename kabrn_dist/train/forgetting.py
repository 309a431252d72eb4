"""What a fine-tuning forgets: bits per byte on the base's own validation data, before the first step and now."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from kabrn_dist.backend.engine import Engine
from kabrn_dist.config import Config
from kabrn_dist.train.datasets import Datasets
from kabrn_dist.train.validation import sum_by_source


def measure_base_bits(
    engine: Engine, datasets: Datasets, config: Config, is_interrupted: Callable[[], bool]
) -> dict[str, float] | None:
    """Return bits per byte of each source that the base was trained on. Collective.

    Args:
        engine: The model in training.
        datasets: Those of the run, with the base's validation split.
        config: The whole configuration.
        is_interrupted: Called before each forward pass; collective, the same on all ranks. True stops it.

    Returns:
        Bits per byte by source, without sources of no text; None if it was interrupted.

    Raises:
        UserError: on all ranks, if one cannot read.
    """
    assert datasets.base is not None
    sums = sum_by_source(engine, datasets.base, datasets.bytes_per_token, config, is_interrupted)
    if sums is None:
        return None
    rows = zip(datasets.base.corpus.names, sums.tolist(), strict=True)
    bits = {name: nats / math.log(2) / text_bytes for name, (nats, _, text_bytes) in rows if text_bytes}
    return {name: value for name, value in bits.items() if math.isfinite(value)}


def relative_rises(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Return how much more bits each source takes than before, as a fraction, for those that are in both.

    Example:
        >>> relative_rises({"wiki": 2.0, "code": 1.0}, {"wiki": 2.1})
        {'wiki': 0.050000000000000044}
    """
    return {name: now[name] / value - 1 for name, value in before.items() if name in now and value > 0}


def forgetting_values(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Return what is logged: bits per byte of each source, and the mean of their relative rises.

    Args:
        before: Bits per byte by source before the first step.
        now: Those of the present model.
    """
    values = {f"forgetting/{name}/bits_per_byte": value for name, value in now.items()}
    rises = relative_rises(before, now)
    return values | ({"forgetting/rise": sum(rises.values()) / len(rises)} if rises else {})


def describe_forgetting(before: Mapping[str, float], now: Mapping[str, float]) -> str:
    """Return the rises as text for the console.

    Example:
        >>> describe_forgetting({"wiki": 1.747}, {"wiki": 1.802})
        'forgetting  wiki 1.747 → 1.802 bits per byte (+3.1 %)'
    """
    parts = [
        f"{name} {before[name]:.3f} → {now[name]:.3f} bits per byte ({round(100 * rise, 1) + 0.0:+.1f} %)"
        for name, rise in relative_rises(before, now).items()
    ]
    return "forgetting  " + ", ".join(parts)
