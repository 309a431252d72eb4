"""Text of a run's console: numbers and times in few characters, and the line of a step in 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping


def format_step(step: int, values: Mapping[str, float], applied: bool) -> str:
    """Return a step's line, at most 80 columns for up to 999,999 steps.

    Args:
        step: number of the step.
        values: scalars by their names in the log; without a loss if no token carried one.
        applied: False for a step that changed nothing.
    """
    parts = [
        f"step {step:6d}",
        f"loss {values['loss/total']:.4f}"[:11] if "loss/total" in values else "loss -",
        f"lr {values['optimizer/learning_rate']:.1e}".replace("e-0", "e-"),
        f"grad {_format_norm(values['optimizer/gradient_norm'])}",
    ]
    if applied:
        speed, left = values["speed/tokens_per_second"], values.get("progress/seconds_left", math.nan)
        parts += [
            f"{format_count(speed)} tok/s",
            f"MFU {_format_percent(values['speed/mfu'])}",
            f"eta {format_duration(left)}",
        ]
    else:
        parts.append("SKIPPED")
    return "  ".join(parts)


def format_text(text: str) -> str:
    r"""Return a text on one line, without characters that a terminal would obey.

    >>> format_text("one\n\n  two\x1b[2J")
    'one two·[2J'
    """
    return " ".join("".join(char if char.isprintable() else "·" for char in word) for word in text.split())


def format_count(value: float) -> str:
    """Return a number in at most five characters: 9,876, 12.3k, 4.56M.

    >>> [format_count(value) for value in (87, 9876, 12345, 4.56e6)]
    ['87', '9,876', '12.3k', '4.56M']
    """
    if value < 9999.5:
        return f"{value:,.0f}"
    power = min(4, int(math.log10(value * (1 + 5e-4)) // 3))
    short = value / 1000**power
    digits = max(0, 2 - int(math.log10(short * (1 + 5e-4))))
    return f"{short:.{digits}f}{'kMGT'[power - 1]}"


def format_duration(seconds: float) -> str:
    """Return a time in at most six characters; "?" if it is not known.

    >>> [format_duration(value) for value in (45, 754, 3720, 277200, float("nan"))]
    ['45s', '12m', '1h02m', '3d05h', '?']
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes}m"
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    days = minutes // 1440
    return f"{days}d{minutes // 60 % 24:02d}h" if days < 10 else f"{days}d"


def _format_norm(value: float) -> str:
    if not math.isfinite(value):
        return "inf"
    for limit, digits in ((10, 2), (100, 1), (1e4, 0)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0e}"


def _format_percent(fraction: float) -> str:
    percent = 100 * fraction
    return f"{percent:.1f}%" if percent < 10 else f"{percent:.0f}%"
