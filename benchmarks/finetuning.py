"""What does fine-tuning a ternary model cost, and what does it reach? Aims on time, memory, bytes, loss and accuracy.

- costs: 1,000 short conversations, 30 M parameters (`benchmarks/finetune_costs.py`);
- losses: each way to fine-tune against `full` on one new domain, and what the base's own data loses by it, without
  and with replay; with --data also problems of GSM8K and questions of NQ-open;
- demonstration: a task that a tiny model masters, answered token by token before and after.

The sizes are those of `benchmarks/finetune_run.py`.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.finetune_costs import CostPlace, measure_costs
from benchmarks.finetune_domains import list_domains
from benchmarks.finetune_measure import HeldOut, measure_greedy_accuracy
from benchmarks.finetune_run import (
    CONTEXT,
    METHODS,
    RATES,
    DomainSequence,
    Place,
    configure_stage,
    has_answers,
    prepare_domains,
    train_base,
)
from benchmarks.finetune_workers import Workers, train_run
from benchmarks.forgetting_matrix import Measurement
from benchmarks.report import Report
from kabrn_dist.inference.run import Run

PARTS = ("costs", "losses", "demonstration")
REPLAYS = (0.0, 0.2)
TASK = "dates"
OF_DATA = ("gsm8k", "nq")
EXERCISES, QUICK_EXERCISES = 200, 4


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Attributes:
        size: name of the model's size in `finetune_run.SIZES`.
        base_steps: of the base.
        steps: on a domain, to compare losses.
        mastery_steps: of the demonstration.
        documents: of each domain, at most.
        rows: held-out rows that are measured.
        exercises: that are answered token by token.
    """

    size: str = "mini"
    base_steps: int = 400
    steps: int = 200
    mastery_steps: int = 500
    documents: int = 4000
    rows: int = 16
    exercises: int = EXERCISES


QUICK = Scale("smallest", 2, 2, 2, 120, 2, QUICK_EXERCISES)


class Lesson(NamedTuple):
    """What a fine-tuning on one domain came to, before and after it.

    Attributes:
        base: of the base's own data.
        domain: of the new domain.
        greedy: shares of exercises that are answered rightly, token by token; zeros where none are asked.
    """

    base: tuple[Measurement, Measurement]
    domain: tuple[Measurement, Measurement]
    greedy: tuple[float, float]

    @property
    def base_rise(self) -> float:
        """Relative rise of the bits per byte of the base's data."""
        return self.base[1].bits / self.base[0].bits - 1


def main() -> None:
    """The command line: parts, tables, JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few steps: shows that everything runs, not what is learned")
    add("--parts", default=",".join(PARTS), metavar="A,B…", help="what is measured (default: %(default)s)")
    add("--data", type=Path, metavar="DIR", help="folder of real text, as of benchmarks.forgetting")
    for name in ("size", "base_steps", "steps", "mastery_steps"):
        default = getattr(Scale, name)
        add(f"--{name.replace('_', '-')}", type=type(default), metavar="N", help=f"(default: {default})")
    add("--work", type=Path, default=Path("runs/finetuning"), metavar="DIR", help="shards and runs (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write rows and aims there")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: there are {', '.join(PARTS)}")
    given = {name: value for name in ("size", "base_steps", "steps", "mastery_steps") if (value := vars(options)[name])}
    scale = replace(QUICK if options.quick else Scale(), **given)
    report = Report(f"Fine-tuning, model {scale.size!r}, base of {scale.base_steps} steps")
    measure(report, parts, scale, Place(options.work, options.data), options.quick)
    report.show()
    if options.json:
        report.write(options.json)


def measure(report: Report, parts: list[str], scale: Scale, place: Place, quick: bool) -> None:
    """Fill the report, each run in a process of its own with one thread; if `quick`, all in one."""
    shutil.rmtree(place.work / "lessons", ignore_errors=True)
    shutil.rmtree(place.work / "costs", ignore_errors=True)
    with Workers(1, place.work / "output.log", keep=quick) as workers:
        if "costs" in parts:
            measure_costs(report, workers, CostPlace(place.work / "costs", quick))
        if "losses" in parts or "demonstration" in parts:
            names = (TASK, *(OF_DATA if place.data else ()))
            prepare_domains(names, scale.size, scale.documents, place)
            workers.submit(train_base, scale.size, "rational", 1, scale.base_steps, place).result()
        if "losses" in parts:
            for name in names:
                compare_losses(report, workers, scale, place, name)
        if "demonstration" in parts:
            demonstrate(report, workers, scale, place)


def describe_lesson(method: str, domain: str, steps: int, replay: float, scale: Scale) -> DomainSequence:
    """Return a sequence of a single domain."""
    chosen = next(each for each in METHODS if each == method)
    return DomainSequence(
        method=chosen,
        experts="rational",
        replay=replay,
        seed=1,
        domains=(domain,),
        size=scale.size,
        steps=steps,
        base_steps=scale.base_steps,
        documents=scale.documents,
        rows=scale.rows,
        rate=RATES[chosen],
    )


def compare_losses(report: Report, workers: Workers, scale: Scale, place: Place, domain: str) -> None:
    """Add the rows and aims of one domain: all methods, without and with replay."""
    for share in REPLAYS:
        lessons = {}
        for method in METHODS:
            lesson = describe_lesson(method, domain, scale.steps, share, scale)
            lessons[method] = workers.submit(teach, lesson, place, 0).result()
        full = lessons["full"].domain[1].bits
        for method, one in lessons.items():
            here = f"{domain}, {method}, replay {share:g}"
            before, after, base = *one.domain, one.base
            report.compare(f"{here}: loss, rival: before", after.bits, before.bits, "bits/byte")
            report.compare(f"{here}: loss, rival: full", after.bits, full, "bits/byte")
            report.compare(f"{here}: loss on base's data, rival: before", base[1].bits, base[0].bits, "bits/byte")
            if share:
                report.at_most(f"{here}: rise of the base's bits per byte", one.base_rise, 0.03)
            print(
                f"{here}: {before.bits:.3f} → {after.bits:.3f} bits per byte, accuracy {before.accuracy:.3f} → "
                f"{after.accuracy:.3f}; base {one.base_rise:+.1%}",
                flush=True,
            )
        excess = lessons["ternary_lora"].domain[1].bits / full - 1
        report.at_most(f"{domain}, replay {share:g}: loss of ternary_lora over that of full", excess, 0.02)


def demonstrate(report: Report, workers: Workers, scale: Scale, place: Place) -> None:
    """Add the rows and aims of a task that is learned to mastery."""
    for method in METHODS:
        lesson = describe_lesson(method, TASK, scale.mastery_steps, 0.0, scale)
        before, after = workers.submit(teach, lesson, place, scale.exercises).result().greedy
        report.compare(f"{TASK}, {method}: right answers after, rival: before", after, before, "share")
        report.at_least(f"{TASK}, {method}: share of right answers", after, 0.9)
        print(f"{TASK}, {method}, {scale.mastery_steps} steps: right answers {before:.1%} → {after:.1%}", flush=True)


def teach(lesson: DomainSequence, place: Place, exercises: int) -> Lesson:
    """Fine-tune on one domain in this process, and measure before and after.

    Args:
        lesson: a sequence of a single domain.
        place: where shards and the base are.
        exercises: that are answered token by token.
    """
    (name,) = lesson.domains
    base = place.base_run(lesson.size, lesson.experts, lesson.seed, lesson.base_steps)
    folder = place.work / "lessons" / f"{name}-{lesson.method}-{lesson.replay:g}-{lesson.steps}"
    own = HeldOut(place.shards(lesson.size, "base"), CONTEXT, lesson.rows, False)
    answers = has_answers(list_domains(place.data)[name])
    new = HeldOut(place.shards(lesson.size, name), CONTEXT, lesson.rows, answers)
    train_run(configure_stage(lesson, place, base, base, name, folder))
    models = Run.open(base).model(), Run.open(folder).model()
    on_base, on_domain = [own.measure(each) for each in models], [new.measure(each) for each in models]
    greedy = [measure_greedy_accuracy(each, new, exercises) if exercises else 0.0 for each in models]
    return Lesson((on_base[0], on_base[1]), (on_domain[0], on_domain[1]), (greedy[0], greedy[1]))


if __name__ == "__main__":
    main()
