"""What does a model forget that learns one domain after another? Four ways to fine-tune, KAN against SwiGLU experts.

A small base learns domains in a sequence, each for as many steps of as many tokens, by full fine-tuning, lora,
ternary_lora and state, without and with replay of the base's own data (earlier domains are never replayed). An adapter
is one that goes on from domain to domain beside the frozen base. After each domain the held-out parts of the base's
data and of all domains are measured: a matrix for each way, and its averages (arXiv 1706.08840), over all seeds.
`benchmarks/finetune_domains.py` says what the domains are; with --data they are real text too.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.finetune_domains import list_domains
from benchmarks.finetune_run import (
    METHODS,
    RATES,
    SIZES,
    DomainSequence,
    Outcome,
    Place,
    learn_sequence,
    prepare_domains,
    train_base,
)
from benchmarks.finetune_workers import Workers
from benchmarks.forgetting_matrix import Averages, Matrix, Measurement, average_matrices, stack_measurements
from benchmarks.report import Report

SEEDS, STEPS, BASE_STEPS, DOCUMENTS, ROWS = 3, 60, 400, 4000, 8
QUICK_STEPS, QUICK_BASE_STEPS, QUICK_DOCUMENTS, QUICK_ROWS = 3, 3, 120, 2
EXPERTS, REPLAYS = ("rational", "swiglu"), (0.0, 0.2)
WITHOUT_DATA = ("addition", "dates", "transliteration", "roman", "sorting", "code")
WITH_DATA = ("shakespeare", "math", "gsm8k", "nq", "addition", "dates", "transliteration", "code")
Way = tuple[str, str, float]


def main() -> None:
    """The command line: shards, bases, sequences, tables, JSON."""
    parser = make_parser()
    options = parser.parse_args()
    try:
        sequences = plan(options)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    with Workers(options.jobs, options.work / "output.log", keep=options.quick) as workers:
        outcomes = run_all(workers, sequences, Place(options.work, options.data), options.log)
    ways = group_ways(outcomes)
    report = Report(f"{len(sequences[0].domains)} domains of {sequences[0].steps} steps, {options.seeds} seed(s)")
    fill(report, ways)
    report.show()
    show(ways, ("base", *sequences[0].domains))
    if options.json:
        report.write(options.json)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of real text; without it all domains are made here")
    add("--domains", type=split_words, metavar="A,B…", help="the domains in order (default: eight with --data, or six)")
    add("--methods", type=split_words, default=METHODS, metavar="A,B…", help="of fine-tuning (default: all four)")
    add("--experts", type=split_words, default=EXPERTS, metavar="A,B", help="rational, swiglu (default: both)")
    add("--replays", type=split_words, default=("0", "0.2"), metavar="X,Y", help="shares (default: 0,0.2)")
    add("--seeds", type=int, metavar="N", help=f"sequences of each way (default: {SEEDS})")
    add("--steps", type=int, metavar="N", help=f"of each domain, with 8 sequences of 256 tokens (default: {STEPS})")
    add("--size", default="mini", choices=tuple(SIZES), help="of the model (default: %(default)s)")
    add("--base-steps", type=int, metavar="N", help=f"of the base (default: {BASE_STEPS})")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes side by side (default: %(default)s)")
    add("--quick", action="store_true", help="a few steps: shows that everything runs, not what is learned")
    add("--work", type=Path, default=Path("runs/forgetting"), metavar="DIR", help="shards and bases (%(default)s)")
    add("--log", type=Path, metavar="FILE", help="append each sequence there; those that it has are not run again")
    add("--json", type=Path, metavar="FILE", help="write rows and aims there")
    return parser


def split_words(text: str) -> tuple[str, ...]:
    """Return the words between commas."""
    return tuple(word for word in text.split(",") if word)


def plan(options: argparse.Namespace) -> list[DomainSequence]:
    """All sequences; completes the options.

    Raises:
        ValueError: for options that cannot be followed, before anything is trained.
        FileNotFoundError: for a folder of real text that lacks a file.
    """
    quick = options.quick
    options.seeds = options.seeds if options.seeds is not None else 1 if quick else SEEDS
    steps = options.steps if options.steps is not None else QUICK_STEPS if quick else STEPS
    base_steps = options.base_steps if options.base_steps is not None else QUICK_BASE_STEPS if quick else BASE_STEPS
    counts = ("seeds", options.seeds), ("steps", steps), ("base-steps", base_steps), ("jobs", options.jobs)
    for name, number in counts:
        if number < 1:
            raise ValueError(f"--{name} {number}: use 1 or more")
    there = list_domains(options.data)
    domains = options.domains or (WITH_DATA if options.data else WITHOUT_DATA)[: 2 if quick else None]
    for flag, given, known in (
        ("domains", domains, tuple(there)),
        ("methods", options.methods, METHODS),
        ("experts", options.experts, EXPERTS),
    ):
        if unknown := [word for word in given if word not in known]:
            raise ValueError(f"--{flag} {','.join(unknown)}: there are {', '.join(known)}")
    return [
        DomainSequence(
            method=method,
            experts=experts,
            replay=float(replay),
            seed=seed,
            domains=tuple(domains),
            size="smallest" if quick else options.size,
            steps=steps,
            base_steps=base_steps,
            documents=QUICK_DOCUMENTS if quick else DOCUMENTS,
            rows=QUICK_ROWS if quick else ROWS,
            rate=RATES[method],
        )
        for seed, experts, replay, method in product(
            range(1, options.seeds + 1), options.experts, options.replays, options.methods
        )
    ]


def run_all(
    workers: Workers, sequences: Sequence[DomainSequence], place: Place, log: Path | None
) -> dict[DomainSequence, Outcome]:
    """Run all sequences that the log does not have; first the shards and the bases that they need."""
    done = read_sequences(log) if log is not None and log.exists() else {}
    left = [one for one in sequences if one not in done]
    outcomes = {one: done[one] for one in sequences if one in done}
    if not left:
        return outcomes
    first = left[0]
    names = dict.fromkeys(name for one in left for name in one.domains)
    prepare_domains(tuple(names), first.size, first.documents, place)
    bases = dict.fromkeys((one.size, one.experts, one.seed, one.base_steps) for one in left)
    for future in [workers.submit(train_base, *base, place) for base in bases]:
        future.result()
    for sequence, outcome in learn_all(workers, left, place):
        outcomes[sequence] = outcome
        if log is not None:
            append_sequence(log, sequence, outcome)
    return outcomes


def learn_all(
    workers: Workers, sequences: Sequence[DomainSequence], place: Place
) -> Iterator[tuple[DomainSequence, Outcome]]:
    """Each sequence as it ends, told in a line."""
    began = {workers.submit(learn_sequence, one, place): one for one in sequences}
    for future in as_completed(began):
        sequence, outcome = began[future], future.result()
        averages = average_matrices(*stack_measurements([outcome.measured]))
        print(
            f"{sequence.method} {sequence.experts} replay {sequence.replay:g} seed {sequence.seed}: learned "
            f"{averages.learned:.3f}, at the end {averages.accuracy:.3f}; base {averages.base_rise:+.1%}",
            flush=True,
        )
        yield sequence, outcome


def append_sequence(log: Path, sequence: DomainSequence, outcome: Outcome) -> None:
    """Add a line of JSON."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**asdict(sequence), **outcome._asdict()}) + "\n")


def read_sequences(log: Path) -> dict[DomainSequence, Outcome]:
    """Return what `append_sequence` wrote."""
    done = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        fields = {name: entry[name] for name in DomainSequence.__dataclass_fields__}
        measured = [[Measurement(*each) for each in row] for row in entry["measured"]]
        sequence = DomainSequence(**fields | {"domains": tuple(fields["domains"])})
        done[sequence] = Outcome(measured, entry["seconds"], entry["trained"])
    return done


def group_ways(outcomes: dict[DomainSequence, Outcome]) -> dict[Way, list[Outcome]]:
    """Return the sequences of all seeds by method, experts and replay."""
    ways: dict[Way, list[Outcome]] = {}
    for one in sorted(outcomes, key=lambda one: (METHODS.index(one.method), one.replay, one.experts, one.seed)):
        ways.setdefault((one.method, one.experts, one.replay), []).append(outcomes[one])
    return ways


def average_way(outcomes: Sequence[Outcome]) -> Averages:
    """Return the averages over all seeds."""
    return average_matrices(*stack_measurements([one.measured for one in outcomes]))


def fill(report: Report, ways: dict[Way, list[Outcome]]) -> None:
    """Rows of each way with KAN experts beside SwiGLU experts."""
    for (method, experts, replay), outcomes in ways.items():
        if experts != EXPERTS[0]:
            continue
        rival = ways.get((method, EXPERTS[1], replay))
        ours, theirs = average_way(outcomes), average_way(rival) if rival else None
        for field, unit in (
            ("learned", "accuracy"),
            ("accuracy", "accuracy"),
            ("backward", "accuracy"),
            ("learned_bits", "bits/byte"),
            ("bits", "bits/byte"),
            ("base_rise", "of bits/byte"),
            ("answers", "right answers"),
        ):
            other = "missing: not run" if theirs is None else getattr(theirs, field)
            name = f"{method}, replay {replay:g}, {field.replace('_', ' ')}, rival: {EXPERTS[1]}"
            report.compare(name, getattr(ours, field), other, unit)


def show(ways: dict[Way, list[Outcome]], columns: Sequence[str]) -> None:
    """The averages of all ways in one table, and a matrix of each."""
    console = Console(width=None if os.isatty(1) else 160)
    table = Table(
        *("method", "experts", "replay", "learned", "at the end", "backward", "forward"),
        *("bits learned", "bits at the end", "base rise", "answers", "parameters", "s a domain"),
        box=box.SIMPLE_HEAD,
    )
    for (method, experts, replay), outcomes in ways.items():
        one = average_way(outcomes)
        accuracies = f"{one.learned:.3f}", f"{one.accuracy:.3f}", f"{one.backward:+.3f}", f"{one.forward:+.3f}"
        losses = f"{one.learned_bits:.3f}", f"{one.bits:.3f}", f"{one.base_rise:+.1%}", f"{one.answers:.3f}"
        seconds = fmean(each for outcome in outcomes for each in outcome.seconds)
        table.add_row(
            method, experts, f"{replay:g}", *accuracies, *losses, f"{outcomes[0].trained:,}", f"{seconds:.0f}"
        )
    console.print(table)
    for way, outcomes in ways.items():
        bits, accuracy, _ = stack_measurements([one.measured for one in outcomes])
        console.print(
            make_matrix_table(f"{' '.join(map(str, way))}: bits per byte | accuracy", columns, bits, accuracy)
        )


def make_matrix_table(title: str, columns: Sequence[str], bits: Matrix, accuracy: Matrix) -> Table:
    """Return a table with a row after each domain and a column for what is measured."""
    table = Table("after", *columns, title=title, box=box.SIMPLE_HEAD)
    for name, row, shares in zip(columns, bits, accuracy, strict=True):
        table.add_row(name, *(f"{bit:.2f} | {share:.2f}" for bit, share in zip(row, shares, strict=True)))
    return table


if __name__ == "__main__":
    main()
