"""`mixkabrn eval`: scores of a model on published tasks."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kabrn_dist.cli.arguments import (
    Subparsers,
    add_command,
    given_path,
    non_negative_int,
    number,
    positive_int,
    whole_number,
)
from kabrn_dist.utils.errors import UserError

if TYPE_CHECKING:
    from kabrn_dist.evaluation.task import Task
    from kabrn_dist.evaluation.task_data import TaskData

DESCRIPTION = """Asks a model the examples of published tasks, which are read from local files, and scores its answers.
`mixkabrn eval --list` names the tasks, the files that each needs, and where they are published.

--data names a folder (or a file, or an archive) in which the tasks find their files; NAME=PATH is for one task. Prompts
begin with few-shot examples of the training split, chosen by --seed: the same ones for every model.

Writes to --out, for each task TASK.jsonl with a line for each example, and then results.json and index.html, a page
with the scores by group and answers right and wrong. Results are kept while they come: after an interruption the same
command goes on with what is missing. With --processes the work is shared. On a CPU a packed model file (`mixkabrn
pack`) is evaluated many times faster than the run."""

EXAMPLES = """  mixkabrn eval --list
  mixkabrn eval runs/tiny --tasks humaneval --allow-code --limit 4
  mixkabrn eval runs/tiny --tasks gsm8k,math,nq_open --data benchmarks --limit 100 --processes 2
  mixkabrn eval exports/tiny --tasks gsm8k,math --data benchmarks --split math=train --shots gsm8k=0
  mixkabrn eval tiny.mkb --tasks hellaswag,piqa --data benchmarks --shots 0
  mixkabrn eval runs/tiny --tasks mbpp --data benchmarks --allow-code --num-samples 20 --temperature 0.8
  mixkabrn eval --tasks gsm8k,math --data benchmarks --contamination data/corpus
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn eval`."""
    parser = add_command(subparsers, "eval", run, "score a model on published tasks", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "model",
        type=given_path,
        nargs="?",
        metavar="MODEL",
        help="folder of a run or of an export, or a model file; none for --list and --contamination",
    )
    parser.add_argument(
        "--step", type=non_negative_int, metavar="N", help="checkpoint of the run (default: the newest intact one)"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="list the tasks, the files that they need and what of them is in --data, and stop",
    )
    parser.add_argument(
        "--tasks",
        default="",
        metavar="NAME,…",
        help="tasks, or all: each one whose data is there, and of those that run code with --allow-code only",
    )
    _add_data(parser)
    parser.add_argument(
        "--out",
        type=given_path,
        metavar="FOLDER",
        help="folder of the results (default: evaluations/tiny for runs/tiny, evaluations/tiny.mkb for the file)",
    )
    _add_computation(parser)
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="allow tasks whose scoring runs programs that the model wrote, in a sandbox",
    )
    parser.add_argument(
        "--contamination",
        type=given_path,
        metavar="SHARDS",
        help="in place of an evaluation, look for the examples of the tasks in a folder of training shards",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PATH|NAME=PATH",
        help="where the data of the tasks is (default: the current folder), or of one task; may be repeated",
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="SPLIT|NAME=SPLIT",
        help="split to be scored (default: the one that a task is usually scored by); may be repeated",
    )
    parser.add_argument(
        "--shots",
        action="append",
        default=[],
        metavar="N|NAME=N",
        help="few-shot examples in a prompt (default: as many as is usual for a task); may be repeated",
    )
    parser.add_argument(
        "--limit",
        type=positive_int,
        default=0,
        metavar="N",
        help="ask N examples, chosen by --seed; a larger N later adds to them (default: all)",
    )


def _add_computation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=32,
        metavar="N",
        help="sequences at once (default 32); changes scores by the rounding of sums alone",
    )
    parser.add_argument(
        "--processes", type=positive_int, default=1, metavar="N", help="processes that share the work (default 1)"
    )
    parser.add_argument("--device", type=_device, default="cpu", help="cpu (default), cuda, cuda:1, …")
    parser.add_argument(
        "--seed",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="chooses few-shot examples and those of --limit, and draws tokens (default 0)",
    )
    parser.add_argument(
        "--num-samples",
        type=positive_int,
        default=1,
        metavar="N",
        help="answers to each prompt, for pass@k; needs --temperature (default 1)",
    )
    parser.add_argument(
        "--temperature", type=number, default=0.0, metavar="T", help="of answers; 0 (default): the likeliest tokens"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=whole_number,
        default=0,
        metavar="N",
        help="leave out few-shot examples from prompts that are longer; 0 (default): prompts may have any length",
    )


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; use cpu, cuda, or cuda:1 for the second card")
    return text


def run(options: argparse.Namespace) -> int:
    """Evaluate, or list the tasks; return the exit code."""
    from kabrn_dist.evaluation.registry import TASKS

    if options.list:
        _list_tasks(options.data, [task() for task in TASKS.values()])
        return 0
    tasks = choose_tasks(options.tasks, list(TASKS))
    _check_numbers(options)
    if options.contamination is None:
        _check_model(options.model)
    data = load_tasks(options, [TASKS[name]() for name in tasks])
    if options.contamination is not None:
        return _check_contamination(options, data)
    return _evaluate(options, data)


def _list_tasks(given: list[str], tasks: list[Task]) -> None:
    from kabrn_dist.evaluation.listing import describe_task

    places = _find_places(given, [task.name for task in tasks])
    for task in tasks:
        print(describe_task(task, places.get(task.name)), end="\n\n")


def choose_tasks(text: str, known: list[str]) -> list[str]:
    """Return the names in a comma-separated list, each once.

    Args:
        text: Names, or "all".
        known: Names of all tasks.

    Raises:
        UserError: for a name that is unknown, with the nearest ones, or none at all.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"--tasks: names no task; use some of {', '.join(known)}, or all")
    if names == ["all"]:
        return known
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"use some of {', '.join(known)}"
            raise UserError(f"--tasks: {name!r} is no task; {hint}")
    return names


def assign_values(option: str, given: list[str], names: list[str]) -> dict[str, str]:
    """Return the value of each task that has one, from values for all tasks, VALUE, and for one, NAME=VALUE.

    Args:
        option: For messages.
        given: The option's values.
        names: Of the tasks.

    Raises:
        UserError: for a value of a task that is not among them, or two for the same.
    """
    common: list[str] = []
    own: dict[str, str] = {}
    for value in given:
        name, equals, rest = value.partition("=")
        # A path may contain the sign too.
        if not equals or not name.replace("_", "").isalnum() or Path(value).exists():
            common.append(value)
        elif name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(names)}"
            raise UserError(f"{option} {value}: {name!r} is none of --tasks; {hint}")
        elif name in own:
            raise UserError(f"{option} {value}: is {own[name]} for {name} before; give one of them")
        else:
            own[name] = rest
    if len(common) > 1:
        raise UserError(f"{option} {common[1]}: is {common[0]} before; give one for all tasks, or NAME=… for each")
    return {name: own.get(name, common[0] if common else "") for name in names if name in own or common}


def _check_numbers(options: argparse.Namespace) -> None:
    if not 0 <= options.temperature <= 100:
        raise UserError(
            f"--temperature {options.temperature:g}: is no temperature; use 0 for the likeliest tokens, or 0.8"
        )
    if options.num_samples > 1 and not options.temperature:
        raise UserError(
            f"--num-samples {options.num_samples}: all answers are the same without --temperature; add it, as 0.8"
        )
    if options.prompt_tokens < 0:
        raise UserError(f"--prompt-tokens {options.prompt_tokens}: is less than 0; use 0 for prompts of any length")


def _check_model(path: Path | None) -> None:
    """Refuse what is no model before data is read, which takes a while too."""
    from kabrn_dist.inference.folder import check_run_folder, is_export

    if path is None:
        raise UserError("MODEL is missing; name the folder of a run or of an export, or a model file")
    if path.suffix == ".mkb" and path.is_file():
        return
    if not is_export(path):
        check_run_folder(path, "config.yaml")


def load_tasks(options: argparse.Namespace, tasks: list[Task]) -> list[TaskData]:
    """Read the data of the tasks, and check that they may be scored.

    Args:
        options: Of the command line.
        tasks: The tasks. If the command asked for all, those are left out, with a line each, that cannot be scored.

    Raises:
        UserError: for a task that cannot be scored, or if none can.
    """
    from kabrn_dist.evaluation.listing import describe_reason
    from kabrn_dist.evaluation.settings import TaskSettings
    from kabrn_dist.evaluation.task_data import load_task_data

    names = [task.name for task in tasks]
    places = _find_places(options.data, names)
    splits, shots = assign_values("--split", options.split, names), assign_values("--shots", options.shots, names)
    counts = {name: _read_count(count) for name, count in shots.items()}
    are_all = options.tasks.strip().lower() == "all"
    loaded = []
    for task in tasks:
        settings = TaskSettings(
            name=task.name,
            data=places.get(task.name, Path()).absolute(),
            split=splits.get(task.name, task.splits[0]),
            # A number for all tasks is for those that have few-shot examples.
            shots=counts.get(task.name, task.default_shots) if task.shots_split or not are_all else 0,
            limit=options.limit,
            seed=options.seed,
            num_samples=options.num_samples,
            temperature=options.temperature,
            prompt_tokens=options.prompt_tokens,
        )
        try:
            _check_permission(task, options)
            loaded.append(load_task_data(task, settings))
            if left_out := task.describe_left_out(settings.data):
                print(f"{task.name}: {left_out}")
        except UserError as error:
            if not are_all:
                raise
            print(f"{task.name}: left out: {describe_reason(task, settings.data, error)}")
    if not loaded:
        raise UserError(
            "--tasks all: none of them can be scored, for the reasons above; give --data the folder of their files"
        )
    return loaded


def _find_places(given: list[str], names: list[str]) -> dict[str, Path]:
    places = {name: Path(place) for name, place in assign_values("--data", given, names).items()}
    for place in places.values():
        if not place.exists():
            raise UserError(f"--data {place}: no such file or folder; `mixkabrn eval --list` says what is expected")
    return places


def _read_count(text: str) -> int:
    try:
        return non_negative_int(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--shots: {error}") from None


def _check_permission(task: Task, options: argparse.Namespace) -> None:
    if task.runs_code and not options.allow_code and options.contamination is None:
        raise UserError(
            f"{task.name}: is scored by running programs that the model wrote, in a sandbox; allow it with --allow-code"
        )


def _evaluate(options: argparse.Namespace, data: list[TaskData]) -> int:
    from kabrn_dist.evaluation.console import show_evaluation
    from kabrn_dist.evaluation.run import Evaluation, share_threads
    from kabrn_dist.evaluation.workers import ModelChoice

    # With the suffix of a model file: results of a run and of the file that it was packed into are not the same.
    name = options.model.absolute().name
    threads = share_threads(options.processes) if options.processes > 1 else 0
    model = ModelChoice(options.model.absolute(), options.device, options.batch_size, threads, options.step)
    if options.step is not None:
        name = f"{name}-step-{options.step}"
    out = options.out if options.out is not None else Path("evaluations", name)
    show_evaluation(Evaluation(model, data, out, options.processes))
    return 0


def _check_contamination(options: argparse.Namespace, data: list[TaskData]) -> int:
    from kabrn_dist.evaluation.answering import shown_prompt
    from kabrn_dist.evaluation.contamination import find_contamination

    texts = {
        each.task.name: [(example.id, shown_prompt(each.make_requests(example, 0)[0])) for example in each.examples]
        for each in data
    }
    print(find_contamination(options.contamination, texts, workers=options.processes).to_table())
    return 0
