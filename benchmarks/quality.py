"""Does it learn? What ternary weights, retention and KAN experts cost in quality, at equal active parameters.

All models see the same characters in the same batches for as many steps, each at the best learning rate of a sweep
that is run with the first seed. (a) and (g) are dense Transformers in plain torch, (b) to (f) are MixKABRN under the
project's own engine, each one part away from another: `benchmarks/quality_run.py` says all that they differ in.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import yaml
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.quality_models import Size
from benchmarks.quality_recipes import BASELINE, CONTEXT, MODELS
from benchmarks.quality_run import MOST_ROWS, Outcome, Run, begin, configure, train
from benchmarks.quality_text import STDLIB, read_text
from benchmarks.report import Report

STEPS, SEEDS = 2000, 3
# A value of --rates.
BEST_KNOWN = "best"
QUICK_STEPS, QUICK_ROWS = 10, 48
# Which of ours the aim is for, and at what share of the rival's bytes.
AIMED, SMALLER = ("d", "f"), 1 / 3
MICRO, MEGA = 1e6, 1e-6


class Best(NamedTuple):
    """A model at its best rate, over all seeds. Attributes: nats: one a seed; seconds: a character, the least."""

    rate: float
    nats: list[float]
    last: Outcome
    seconds: float

    @property
    def mean(self) -> float:
        """The mean loss over the seeds."""
        return fmean(self.nats)

    @property
    def spread(self) -> float:
        """Between the best and the worst seed."""
        return max(self.nats) - min(self.nats)


def main() -> None:
    """The command line: sweep, further seeds, tables, JSON."""
    parser = make_parser()
    options = parser.parse_args()
    try:
        sweep = plan(options)
    except ValueError as error:
        parser.error(str(error))
    outcomes: dict[Run, Outcome] = {}
    # One thread each; a forked process would share those of its parent.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, initializer=begin) as workers:
        for run, outcome in train_all(workers, sweep, options.log, options.export):
            outcomes[run] = outcome
        more = [
            replace(find_best(m, outcomes), seed=seed) for m in options.models for seed in range(2, options.seeds + 1)
        ]
        for run, outcome in train_all(workers, more, options.log, options.export):
            outcomes[run] = outcome
    best = {model: take_best(model, outcomes) for model in options.models}
    report = Report(f"{options.text}: {sweep[0].steps:,} steps, {options.seeds} seed(s)")
    fill(report, best)
    report.show()
    show(best)
    if options.json:
        report.write(options.json)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", default=STDLIB, help=f"a UTF-8 text file, or {STDLIB} for Python's library (default: %(default)s)")
    add("--steps", type=int, metavar="N", help=f"optimizer steps of a run (default: {STEPS:,})")
    add("--seeds", type=int, metavar="N", help=f"runs of a model at its best rate (default: {SEEDS})")
    add("--models", default="".join(MODELS), help="letters of those to train (default: %(default)s)")
    add(
        "--rates",
        metavar="R,R…",
        help=f"learning rates, or {BEST_KNOWN}: a model's best known (default: three a model)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of all models but the "
        f"({BASELINE}), such as model.short_conv_size=0 or optimizer.min_lr_ratio=0; may be repeated",
    )
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs side by side (default: %(default)s)")
    add("--quick", action="store_true", help="a few steps of each model: shows that all of them run, not what they can")
    add(
        "--log",
        type=Path,
        metavar="FILE",
        help="append each run there as it ends, a line of JSON; runs that it has are not run again",
    )
    add(
        "--export",
        type=Path,
        metavar="DIR",
        help="leave each dense Transformer that is trained in a folder there, for Hugging Face's libraries",
    )
    add("--json", type=Path, metavar="FILE", help="write rows and aims there")
    return parser


def plan(options: argparse.Namespace) -> list[Run]:
    """The sweep: each model at each of its rates, with the first seed. Completes the options.

    Raises:
        ValueError: for options that cannot be followed, before anything is trained.
    """
    options.seeds = options.seeds if options.seeds is not None else 1 if options.quick else SEEDS
    steps = options.steps if options.steps is not None else QUICK_STEPS if options.quick else STEPS
    for name, number in (("steps", steps), ("seeds", options.seeds), ("jobs", options.jobs)):
        if number < 1:
            raise ValueError(f"--{name} {number}: use 1 or more")
    if not options.models or set(options.models) - set(MODELS):
        raise ValueError(f"--models {options.models}: there are {', '.join(MODELS)}; write, say, {BASELINE}d")
    rows = QUICK_ROWS if options.quick else MOST_ROWS
    changes = tuple(map(read_change, options.set))
    vocabulary = read_text(options.text, CONTEXT).vocabulary
    runs = []
    for model in options.models:
        known = MODELS[model].rates
        best_only = options.rates == BEST_KNOWN or (options.quick and not options.rates)
        rates = known[:1] if best_only else options.rates.split(",") if options.rates else known
        for rate in rates:
            run = Run(model, read_rate(rate), 1, steps, options.text, rows, changes)
            try:
                configure(run, vocabulary)
            except ValidationError as error:
                raise ValueError(f"model {model}, rate {rate}: {' '.join(str(error).split())}") from None
            runs.append(run)
    return runs


def read_change(change: str) -> tuple[str, str]:
    """Return key and value of a `--set`."""
    key, found, value = change.partition("=")
    if not found or key.partition(".")[0] not in ("model", "optimizer"):
        raise ValueError(f"--set {change}: write it as model.KEY=VALUE or optimizer.KEY=VALUE")
    try:
        yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change}: not valid YAML: {' '.join(str(error).split())}") from None
    return key, value


def read_rate(rate: str | float) -> float:
    """Return a learning rate as a number."""
    try:
        return float(rate)
    except ValueError:
        raise ValueError(f"--rates: {rate!r} is not a number; write, say, 3e-3,5e-3, or {BEST_KNOWN}") from None


def train_all(
    workers: ProcessPoolExecutor, runs: Sequence[Run], log: Path | None, export: Path | None
) -> Iterator[tuple[Run, Outcome]]:
    """Each run as it ends, told and logged; those that the log has already are not run again."""
    done = read_log(log) if log is not None and log.exists() else {}
    yield from ((run, done[run]) for run in runs if run in done)
    began = {workers.submit(train, run, export): run for run in runs if run not in done}
    for future in as_completed(began):
        run, outcome = began[future], future.result()
        print(f"({run.model}) rate {run.rate:g}, seed {run.seed}: {outcome.nats:.4f} nats", flush=True)
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({**asdict(run), **outcome._asdict(), "size": outcome.size._asdict()}) + "\n")
        yield run, outcome


def read_log(log: Path) -> dict[Run, Outcome]:
    """What ended before."""
    done = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        run = {name: entry[name] for name in Run.__dataclass_fields__}
        changes = tuple((key, value) for key, value in run.pop("changes"))
        outcome = {name: entry[name] for name in Outcome._fields}
        done[Run(**run, changes=changes)] = Outcome(**(outcome | {"size": Size(**entry["size"])}))
    return done


def find_best(model: str, outcomes: dict[Run, Outcome]) -> Run:
    """The first seed's run at the best rate."""
    first = [run for run in outcomes if run.model == model and run.seed == 1]
    return min(first, key=lambda run: outcomes[run].nats)


def take_best(model: str, outcomes: dict[Run, Outcome]) -> Best:
    """Return a model's runs at its best rate."""
    rate = find_best(model, outcomes).rate
    mine = [outcome for run, outcome in outcomes.items() if (run.model, run.rate) == (model, rate)]
    return Best(rate, [one.nats for one in mine], mine[0], min(one.seconds for one in mine))


def fill(report: Report, best: dict[str, Best]) -> None:
    """Rows of each of ours beside the rival, and the aim."""
    rival = best.get(BASELINE)
    missing = f"missing: ({BASELINE}) was not trained"
    for model, ours in best.items():
        if model == BASELINE and len(best) > 1:
            continue
        figures = {
            "validation": (ours.mean, rival and rival.mean, "nats"),
            "weights": (ours.last.size.bytes * MEGA, rival and rival.last.size.bytes * MEGA, "MB"),
            "active parameters": (ours.last.size.active, rival and rival.last.size.active, ""),
            "parameters": (ours.last.size.total, rival and rival.last.size.total, ""),
            "training, a character on one core": (ours.seconds * MICRO, rival and rival.seconds * MICRO, "µs"),
        }
        if len(ours.nats) > 1:
            figures["spread over seeds"] = (ours.spread, rival and rival.spread, "nats")
        for what, (mine, theirs, unit) in figures.items():
            report.compare(f"({model}) {what}, rival: ({BASELINE})", mine, missing if theirs is None else theirs, unit)
    reached = None
    if rival is not None:
        bound = SMALLER * rival.last.size.bytes
        small = [best[model].mean for model in AIMED if model in best and best[model].last.size.bytes <= bound]
        reached = min(small) / rival.mean if small else None
    report.at_most(f"({') or ('.join(AIMED)}) at 1/3 of ({BASELINE})'s bytes: nats over ({BASELINE})'s", reached, 1.0)


def show(best: dict[str, Best]) -> None:
    """One line a model."""
    table = Table("", "model", "rate", "nats", "spread", "MB", "active", "in all", "characters/s", box=box.SIMPLE_HEAD)
    for model, one in best.items():
        size = one.last.size
        counts = f"{size.bytes * MEGA:.2f}", f"{size.active:,}", f"{size.total:,}", f"{1 / one.seconds:,.0f}"
        table.add_row(model, MODELS[model].what, f"{one.rate:g}", f"{one.mean:.4f}", f"{one.spread:.4f}", *counts)
    Console(width=None if os.isatty(1) else 140).print(table)


if __name__ == "__main__":
    main()
