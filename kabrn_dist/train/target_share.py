"""The share of a session's tokens that carry loss, and a warning of steps without any."""

from __future__ import annotations

from kabrn_dist.backend.losses import StepTotals


class TargetShare:
    """Counts tokens and targets of a session's steps."""

    def __init__(self) -> None:
        self._tokens = self._targets = 0
        self._is_told = False

    def add(self, totals: StepTotals) -> str:
        """Count a step. Returns a warning at the first one without targets, and an empty text otherwise.

        Args:
            totals: the step's totals, the same on all ranks.
        """
        self._tokens += totals.tokens
        self._targets += totals.valid_tokens
        if totals.valid_tokens or self._is_told:
            return ""
        self._is_told = True
        return (
            f"warning: none of its {totals.tokens:,} tokens is a target, so it changes nothing, as any further step "
            f"like it; of this session's tokens {self._targets:,} of {self._tokens:,} "
            f"({self._targets / self._tokens:.2%}) were targets"
        )
