"""What all ranks must agree on before a step changes anything: is it good, and does anyone wish to stop?"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kabrn_dist.backend.losses import Losses
from kabrn_dist.config import GuardConfig
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.train.spikes import SpikeWindow

# What a rank reports of its step; the worst is named first in a message.
_FINE, _GRADIENT, _LOSS = 0, 1, 2


class StepSync(NamedTuple):
    """The same on all ranks.

    Attributes:
        losses: the step's, by the names of `Losses`.
        bad_losses, bad_gradients: ranks whose share of the loss, or only whose gradients, are not finite.
        stop: a rank wishes to stop. ended: on all ranks the checkpoint that is written beside the training is done.
    """

    losses: dict[str, float]
    bad_losses: list[int]
    bad_gradients: list[int]
    stop: bool
    ended: bool


def sync_step(mesh: Mesh, losses: Tensor, gradients: Tensor, stop: bool, ended: bool) -> StepSync:
    """Everything that the ranks must know of each other before an update, in one all-reduce. Collective.

    Args:
        losses: this rank's shares of the step's losses, in the order of `Losses`.
        gradients: scalar that is finite where this rank's gradients are.
    """
    count, device = len(Losses._fields), mesh.device
    sent = torch.zeros(count + 2 + mesh.world_size, dtype=torch.float64, device=device)
    sent[:count] = losses
    sent[count : count + 2] = torch.tensor([float(stop), float(ended)], dtype=torch.float64)
    # On the device, as each look at a value there costs a wait.
    worst = torch.where(gradients.isfinite(), _FINE, _GRADIENT)
    sent[count + 2 + mesh.rank] = torch.where(losses.isfinite().all(), worst, _LOSS)
    received = mesh.all_reduce_sum(sent).tolist()
    reports = received[count + 2 :]
    return StepSync(
        {name: value / mesh.world_size for name, value in zip(Losses._fields, received, strict=False)},
        [rank for rank, report in enumerate(reports) if report == _LOSS],
        [rank for rank, report in enumerate(reports) if report == _GRADIENT],
        stop=received[count] > 0,
        ended=received[count + 1] == mesh.world_size,
    )


class Decision(NamedTuple):
    """What is made of a step: `skip` keeps it from changing anything, `reason` is for people, empty for a good one."""

    kind: Literal["good", "spike", "bad"]
    skip: bool
    reason: str


class LossGuard:
    """Judges steps and counts the bad ones. What it remembers travels in checkpoints.

    Attributes:
        skipped, spikes, rollbacks: since the start of the run.
        bad: bad steps in a row.
        returned_to: step of the checkpoint that the run last went back to, None if it never did.
    """

    def __init__(self, settings: GuardConfig) -> None:
        self.settings = settings
        self.window = SpikeWindow(settings.spike_window, settings.spike_sigma, settings.max_bad_steps)
        self.skipped = self.spikes = self.rollbacks = self.bad = 0
        self.returned_to: int | None = None

    def decide(self, agreed: StepSync) -> Decision:
        """To be asked once for each step, before its update."""
        if agreed.bad_losses or agreed.bad_gradients:
            self.bad += 1
            what, ranks = ("loss", agreed.bad_losses) if agreed.bad_losses else ("gradient", agreed.bad_gradients)
            return Decision("bad", True, f"non-finite {what} on {_name(ranks)}")
        self.bad = 0
        loss, limit = agreed.losses["language"], self.window.limit()
        if self.settings.spike == "off" or not self.window.is_spike(loss):
            return Decision("good", False, "")
        self.spikes += 1
        reason = f"language loss {loss:.4f} is a spike, above {limit:.4f} = mean + {self.settings.spike_sigma:g}σ"
        return Decision("spike", self.settings.spike == "skip", reason)

    def record(self, verdict: Decision, agreed: StepSync, applied: bool) -> None:
        """After the step: `applied` is False where it was skipped, by this guard or because fp16 overflowed."""
        if not applied:
            self.skipped += 1
        elif verdict.kind == "good":
            self.window.add(agreed.losses["language"])

    @property
    def exhausted(self) -> bool:
        """So many bad steps in a row that the run must go back to its last checkpoint."""
        return self.bad >= self.settings.max_bad_steps

    def roll_back(self, step: int, state: dict[str, Any]) -> None:
        """Forget what was learned since the checkpoint of `step`, but for what happened."""
        skipped, spikes, rollbacks = self.skipped, self.spikes, self.rollbacks + 1
        self.restore(state)
        self.skipped, self.spikes, self.rollbacks, self.bad = skipped, spikes, rollbacks, 0
        self.returned_to = step

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON types."""
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
        """Continue from a checkpoint; nothing in `state` is a fresh start."""
        self.skipped, self.spikes, self.rollbacks, self.bad = (
            int(state.get(name, 0)) for name in ("skipped", "spikes", "rollbacks", "bad")
        )
        returned = state.get("returned_to")
        self.returned_to = None if returned is None else int(returned)
        self.window.restore(map(float, state.get("window", [])), int(state.get("spikes_in_a_row", 0)))


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
