"""Detection of loss spikes: a loss far above those of the last good steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

# A larger one, such as a checkpoint of a stranger has, would overflow in the variance.
_LARGEST_LOSS = 1e100


class SpikeWindow:
    """The losses of the last good steps, in nats.

    Args:
        size: number of steps; there are no spikes before the window is full.
        sigma: number of standard deviations above the mean from which a loss is a spike.
        patience: more spikes in a row than this are a new level of the loss, and the window is cleared. Without this
            a run that skips spikes would never train again after its data has changed.
    """

    def __init__(self, size: int, sigma: float, patience: int) -> None:
        self.sigma, self.patience = sigma, patience
        self.losses: deque[float] = deque(maxlen=size)
        self.in_a_row = 0

    def limit(self) -> float:
        """Return the largest loss that is no spike; infinite until the window is full."""
        if len(self.losses) < (self.losses.maxlen or 0):
            return math.inf
        mean = math.fsum(self.losses) / len(self.losses)
        variance = math.fsum((loss - mean) ** 2 for loss in self.losses) / len(self.losses)
        return mean + self.sigma * math.sqrt(variance)

    def is_spike(self, loss: float) -> bool:
        """Return True for a loss above the limit. Call once per step: it counts the spikes in a row."""
        if loss <= self.limit():
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        if self.in_a_row > self.patience:
            self.losses.clear()
            self.in_a_row = 0
            return False
        return True

    def add(self, loss: float) -> None:
        """Add the loss of a good step."""
        self.losses.append(min(max(loss, -_LARGEST_LOSS), _LARGEST_LOSS))

    def restore(self, losses: Iterable[float], in_a_row: int) -> None:
        """Continue from a checkpoint's state."""
        self.losses.clear()
        for loss in losses:
            self.add(loss)
        self.in_a_row = in_a_row
