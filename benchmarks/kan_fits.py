"""Do networks of our edges learn what the KAN paper's learn? Its fitting tasks (arXiv 2404.19756, §3.1).

The tasks are the paper's, with 20 dimensions where it has 100, and 5 hidden nodes (as in its figure 2.4) where one
makes the outcome a matter of the seed. All networks get the same thousand samples and as many full-batch steps of the
same optimizer (LBFGS), in float64. The figure is the median over seeds of the RMSE on a thousand others.

- ours: `edge_layer` with plain matrices, as `bspline` (cubic) and `hat` (degree 1), on grids that stay as they are:
  [−1,1], where the samples are, in the first layer, and [−2,2], the default of the configuration, in the second.
- pykan: as it comes, with its updates of the grids, every fifth step; cubic for `bspline`, degree 1 for
  `hat`, and cubic beside `hat` for information: on one edge, piecewise lines on the same knots cannot get so close.
- MLP: SiLU, of at least as many parameters as ours, the better of one and of two hidden layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.report import Report
from kabrn_dist.ops.edge_layer import edge_layer
from kabrn_dist.ops.grids import Grid

SAMPLES = 1000
GRID_UPDATES, UPDATED_UP_TO = 10, 50  # the defaults of pykan's `fit`
RMSE = "RMSE"


class Task(NamedTuple):
    """A function to fit and where its inputs lie."""

    name: str
    function: Callable[[Tensor], Tensor]  # [N,n] → [N]
    widths: tuple[int, ...]
    grid: int


TASKS = (
    Task("J0(20x)", lambda x: torch.special.bessel_j0(20 * x[:, 0]), (1, 1), 20),
    Task("exp(sin πx + y²)", lambda x: (torch.sin(math.pi * x[:, 0]) + x[:, 1] ** 2).exp(), (2, 5, 1), 5),
    Task("xy", lambda x: x[:, 0] * x[:, 1], (2, 2, 1), 5),
    Task("exp(Σ sin²(πx/2) / 20)", lambda x: torch.sin(math.pi / 2 * x).square().mean(-1).exp(), (20, 1, 1), 5),
)


class Fitted(NamedTuple):
    """RMSE on both sets, and seconds of training."""

    train: float
    test: float
    seconds: float


class Edges(nn.Module):
    """Layers of functions on edges, from widths[0] to widths[-1]. The start is pykan's in kind and size."""

    def __init__(self, widths: tuple[int, ...], grid: int, degree: int) -> None:
        super().__init__()
        reaches = (1.0, *(2.0,) * (len(widths) - 2))
        self.grids = [Grid(-reach, reach, grid, degree) for reach in reaches]
        self.bases, self.splines = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(widths):
            bound = inputs**-0.5
            self.bases.append(torch.empty(1, outputs, inputs).uniform_(-bound, bound))
            noise = 0.15 * bound / grid
            self.splines.append(torch.empty(1, outputs, inputs * (grid + degree)).uniform_(-noise, noise))

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's values: [N,inputs] → [N,1]."""
        for base, spline, grid in zip(self.bases, self.splines, self.grids, strict=True):
            x = edge_layer(x, base, spline, (len(x),), grid, quantized=False)
        return x


def mlp(inputs: int, parameters: int, layers: int) -> nn.Module:
    """With `layers` hidden ones, of the least width that has at least so many parameters."""
    for hidden in range(1, parameters + 1):
        widths = (inputs, *(hidden,) * layers, 1)
        products = [nn.Linear(i, o) for i, o in pairwise(widths)]
        network = nn.Sequential(*(part for product in products for part in (product, nn.SiLU())))[:-1]
        if count(network) >= parameters:
            break
    return network


def count(network: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def pykan(task: Task, degree: int) -> nn.Module:
    """Raises ImportError where it is not installed."""
    from kan import KAN

    network = KAN(list(task.widths), grid=task.grid, k=degree, seed=torch.initial_seed(), auto_save=False)
    # As its own `fit` does for speed.
    network.symbolic_enabled = network.save_act = False
    result: nn.Module = network
    return result


def fit(network: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], steps: int) -> Fitted:
    """Full-batch steps of LBFGS, pykan's own choice, on the mean square error."""
    parameters = [p for p in network.double().parameters() if p.requires_grad]
    tiny = 1e-32  # both tolerances of pykan's own: no step ends before its 20 iterations
    optimizer = torch.optim.LBFGS(
        parameters, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=tiny, tolerance_change=tiny
    )
    update_grid = getattr(network, "update_grid", None)

    def loss() -> float:
        optimizer.zero_grad()
        error = (network(train[0]) - train[1]).square().mean()
        error.backward()
        return error

    start = time.perf_counter()
    for step in range(steps):
        if update_grid is not None and step < UPDATED_UP_TO and step % (UPDATED_UP_TO // GRID_UPDATES) == 0:
            update_grid(train[0])
        optimizer.step(loss)
    seconds = time.perf_counter() - start
    return Fitted(rmse(network, *train), rmse(network, *test), seconds)


def rmse(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the root of the mean squared error."""
    with torch.no_grad():
        return float((network(x) - y).square().mean().sqrt())


def samples(task: Task, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return inputs and values to train on, and others to test on."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(2 * SAMPLES, task.widths[0], generator=draw, dtype=torch.float64) * 2 - 1
    y = task.function(x)[:, None]
    return (x[:SAMPLES], y[:SAMPLES]), (x[SAMPLES:], y[SAMPLES:])


def medians(build: Callable[[], nn.Module], task: Task, steps: int, seeds: int) -> Fitted:
    """Of each figure, over the seeds; a network that diverged counts as infinitely far off."""
    fitted = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        fitted.append(fit(build(), *samples(task, seed), steps))
    return Fitted(*(median(math.inf if math.isnan(v) else v for v in values) for values in zip(*fitted, strict=True)))


def question(report: Report, quick: bool) -> None:
    """Rows and aims for each task and optimizer."""
    seeds = 1 if quick else 3
    for task in TASKS[::2] if quick else TASKS:
        compare(report, task, 1 if quick else 25, seeds)


def compare(report: Report, task: Task, steps: int, seeds: int) -> None:
    """Add rows of the errors of all networks on one task."""
    here = f"fit {task.name}, {steps} steps of LBFGS"
    degrees = {"bspline": 3, "hat": 1}
    ours = {
        form: medians(partial(Edges, task.widths, task.grid, degree), task, steps, seeds)
        for form, degree in degrees.items()
    }
    theirs: dict[int, Fitted] = {}
    try:
        theirs = {degree: medians(partial(pykan, task, degree), task, steps, seeds) for degree in (3, 1)}
        missing = ""
    except ImportError as error:
        missing = f"missing: {error.name} (make bench-kan installs it)"
    for form, degree in degrees.items():
        rival = theirs.get(degree)
        for part in Fitted._fields:
            value = getattr(ours[form], part)
            unit = "s" if part == "seconds" else RMSE
            name = f"{here}: {form} {part}, rival: pykan of degree {degree}"
            report.compare(name, value, getattr(rival, part) if rival else missing, unit)
        over = ours[form].test / rival.test if rival else None
        report.at_most(f"{here}: test RMSE of {form} over that of pykan of degree {degree}", over, 1.0)
    cubic = theirs[3].test if theirs else missing
    report.compare(f"{here}: hat test, rival: pykan of degree 3", ours["hat"].test, cubic, RMSE)
    for form, degree in degrees.items():
        parameters = count(Edges(task.widths, task.grid, degree))
        rivals = [medians(partial(mlp, task.widths[0], parameters, n), task, steps, seeds) for n in (1, 2)]
        best = min(rivals, key=lambda rival: rival.test)
        report.compare(f"{here}: {form} test, rival: MLP of {parameters} parameters", ours[form].test, best.test, RMSE)
        report.at_most(f"{here}: test RMSE of {form} over that of an MLP", ours[form].test / best.test, 1.0)
