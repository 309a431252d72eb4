"""How much a learning may take, how far it is, and what became of it."""

from __future__ import annotations

import time
from typing import NamedTuple


class LearningLimits(NamedTuple):
    """How much learning may take.

    Attributes:
        seconds: Time for the steps.
        steps: Largest number of steps.
        memory_bytes: Memory for what the passes keep, beside the model.
    """

    seconds: float = 120.0
    steps: int = 1000
    memory_bytes: int = 1_000_000_000


class LearningResult(NamedTuple):
    """What became of it.

    Attributes:
        steps: Number of steps that what is kept has taken.
        seconds: Time that it took.
        before: Mean loss of the targets in nats before, of what was not learned from if there was enough.
        after: The same after.
        held_out: Whether these losses are of samples that were not learned from.
        base_before: Loss of the base's text in nats before; None if there is none at hand.
        base_after: The same after.
        passes: How often the samples were read, on the average.
        interrupted: Whether Ctrl-C ended it.
    """

    steps: int
    seconds: float
    before: float
    after: float
    held_out: bool
    base_before: float | None
    base_after: float | None
    passes: float
    interrupted: bool


class LearningProgress(NamedTuple):
    """How far learning is.

    Attributes:
        share: Part of the time or the steps that is used, 0 to 1.
        loss: Mean loss of the targets of the last step, in nats.
        seconds_left: Time that is left at most.
    """

    share: float
    loss: float
    seconds_left: float


class Course:
    """Steps and time of one learning.

    Args:
        limits: What it may take.
        steps: Largest number of steps, at least one.

    Attributes:
        begun: When it began, by time.monotonic().
        passes: How often the samples were read, on the average.
    """

    def __init__(self, limits: LearningLimits, steps: int) -> None:
        self._seconds, self._steps = limits.seconds, max(1, steps)
        self._taken = 0
        self.begun, self.passes = time.monotonic(), 0.0

    def start(self) -> None:
        """Begin to count the time."""
        self.begun = time.monotonic()

    def count(self) -> None:
        """Count a step."""
        self._taken += 1

    @property
    def share(self) -> float:
        """Part of the time or of the steps that is used; 1 and more: all."""
        return max(self._taken / self._steps, (time.monotonic() - self.begun) / self._seconds)

    @property
    def ended(self) -> bool:
        """Whether time or steps are used up."""
        return self.share >= 1

    @property
    def rate(self) -> float:
        """Factor of the learning rate, which falls linearly to a tenth."""
        return max(0.1, 1 - self.share)

    def progress(self, loss: float) -> LearningProgress:
        """Return how far it is, with the loss of the last step."""
        left = self._seconds - (time.monotonic() - self.begun)
        return LearningProgress(min(1.0, self.share), loss, max(0.0, left))
