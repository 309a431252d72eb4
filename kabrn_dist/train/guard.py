"""Checks that every rank runs before the optimizer step: finite loss and gradients, loss spikes, stop requests."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kabrn_dist.backend.losses import Losses
from kabrn_dist.config import GuardConfig
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.train.spikes import SpikeWindow

# What a rank reports of its step; the worst is named first in a message.
_FINITE, _BAD_GRADIENT, _BAD_LOSS = 0, 1, 2


class StepSync(NamedTuple):
    """State of a step that all ranks have exchanged; the same on all of them.

    Attributes:
        losses: the step's losses, by the names of `Losses`.
        bad_losses: ranks whose part of the loss is not finite.
        bad_gradients: ranks whose gradients are not finite although their loss is.
        stop: True if any rank has received a stop request.
        save_done: True if the asynchronous checkpoint is written on all ranks.
    """

    losses: dict[str, float]
    bad_losses: list[int]
    bad_gradients: list[int]
    stop: bool
    save_done: bool


def sync_step(mesh: Mesh, losses: Tensor, gradients: Tensor, stop: bool, save_done: bool) -> StepSync:
    """Exchange in one all-reduce what the ranks must know of each other before an update. Collective.

    Args:
        mesh: all ranks.
        losses: this rank's parts of the step's losses, in the order of `Losses`.
        gradients: scalar that is finite if this rank's gradients are.
        stop: whether this rank has received a stop request.
        save_done: whether this rank has finished writing its part of the asynchronous checkpoint.
    """
    count, device = len(Losses._fields), mesh.device
    sent = torch.zeros(count + 2 + mesh.world_size, dtype=torch.float64, device=device)
    sent[:count] = losses
    sent[count : count + 2] = torch.tensor([float(stop), float(save_done)], dtype=torch.float64)
    # Computed on the device, as reading a value from there costs a wait.
    gradient_report = torch.where(gradients.isfinite(), _FINITE, _BAD_GRADIENT)
    sent[count + 2 + mesh.rank] = torch.where(losses.isfinite().all(), gradient_report, _BAD_LOSS)
    received = mesh.all_reduce_sum(sent).tolist()
    reports = received[count + 2 :]
    return StepSync(
        {name: value / mesh.world_size for name, value in zip(Losses._fields, received, strict=False)},
        [rank for rank, report in enumerate(reports) if report == _BAD_LOSS],
        [rank for rank, report in enumerate(reports) if report == _BAD_GRADIENT],
        stop=received[count] > 0,
        save_done=received[count + 1] == mesh.world_size,
    )


class Decision(NamedTuple):
    """Decision about one step.

    Attributes:
        kind: what was found; "empty" is a step without a target.
        skip: do not apply the update.
        reason: message for the console; empty for a good step.
    """

    kind: Literal["good", "empty", "spike", "bad"]
    skip: bool
    reason: str


class LossGuard:
    """Decides whether steps are applied and counts the bad ones. Its state travels in checkpoints.

    Args:
        config: the `guard` section.

    Attributes:
        window: losses of the last good steps.
        skipped: steps skipped since the start of the run.
        spikes: loss spikes since the start of the run.
        rollbacks: returns to a checkpoint since the start of the run.
        bad: bad steps in a row.
        returned_to: step of the checkpoint that the run last went back to; None if it never did.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.window = SpikeWindow(config.spike_window, config.spike_sigma, config.max_bad_steps)
        self.skipped = self.spikes = self.rollbacks = self.bad = 0
        self.returned_to: int | None = None

    def decide(self, sync: StepSync, has_targets: bool = True) -> Decision:
        """Return what to do with a step. Call once per step, before its update.

        Args:
            sync: its exchanged state.
            has_targets: False if no token of the step, on any rank, carries loss: then there is nothing to learn, and
                its loss of 0 says nothing about those of other steps.
        """
        if sync.bad_losses or sync.bad_gradients:
            self.bad += 1
            kind, ranks = ("loss", sync.bad_losses) if sync.bad_losses else ("gradient", sync.bad_gradients)
            return Decision("bad", True, f"non-finite {kind} on {_join_ranks(ranks)}")
        self.bad = 0
        if not has_targets:
            return Decision("empty", True, "")
        loss, limit = sync.losses["language"], self.window.limit()
        if self.config.spike == "off" or not self.window.is_spike(loss):
            return Decision("good", False, "")
        self.spikes += 1
        reason = f"language loss {loss:.4f} is a spike, above {limit:.4f} = mean + {self.config.spike_sigma:g}σ"
        return Decision("spike", self.config.spike == "skip", reason)

    def record(self, decision: Decision, sync: StepSync, applied: bool) -> None:
        """Count a finished step.

        Args:
            decision: what `decide` returned for it.
            sync: its exchanged state.
            applied: False if it was skipped, by this guard or because fp16 overflowed.
        """
        if not applied:
            self.skipped += 1
        elif decision.kind == "good":
            self.window.add(sync.losses["language"])

    @property
    def exhausted(self) -> bool:
        """True after `max_bad_steps` bad steps in a row: the run must go back to its last checkpoint."""
        return self.bad >= self.config.max_bad_steps

    def roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Restore the state of the checkpoint of `step`, but keep the counters and count the rollback."""
        skipped, spikes, rollbacks = self.skipped, self.spikes, self.rollbacks + 1
        self.restore(state)
        self.skipped, self.spikes, self.rollbacks, self.bad = skipped, spikes, rollbacks, 0
        self.returned_to = step

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, JSON types only."""
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "rollbacks": self.rollbacks,
            "bad": self.bad,
            "returned_to": self.returned_to,
            "window": list(self.window.losses),
            "spikes_in_a_row": self.window.in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state; an empty one is a fresh start."""
        self.skipped, self.spikes, self.rollbacks, self.bad = (
            int(state.get(name, 0)) for name in ("skipped", "spikes", "rollbacks", "bad")
        )
        returned = state.get("returned_to")
        self.returned_to = None if returned is None else int(returned)
        self.window.restore(map(float, state.get("window", [])), int(state.get("spikes_in_a_row", 0)))


def _join_ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
