"""`mixkabrn plan`: check a configuration for a number of processes and print what would be trained."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kabrn_dist.cli.arguments import Subparsers, add_command, add_config, positive_int
from kabrn_dist.utils.errors import UserError

if TYPE_CHECKING:
    from kabrn_dist.config import Config
    from kabrn_dist.train.datasets import Datasets

DESCRIPTION = """Checks the configuration for N processes, opens the data, and prints the layout of the processes, the
number of parameters, memory per process, and how often each source is read. Starts and writes nothing."""

EXAMPLES = """  mixkabrn plan configs/tiny.yaml
  mixkabrn plan configs/big.yaml --world 64
  mixkabrn plan configs/tiny.yaml --world 2 --set parallel.zero_stage=2
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn plan`."""
    parser = add_command(
        subparsers,
        "plan",
        run,
        "show layout, parameters and memory of a run without starting it",
        DESCRIPTION,
        EXAMPLES,
    )
    add_config(parser, "YAML file of the run")
    parser.add_argument(
        "--world", type=positive_int, metavar="N", help="number of processes (default: those that were started, or 1)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the plan of a configuration file; return the exit code."""
    return print_plan(load(options), options.world)


def load(options: argparse.Namespace) -> Config:
    """Return the configuration that CONFIG and --set describe; a vocabulary that is left out is that of the shards.

    Raises:
        UserError: for a wrong configuration, or shards that cannot be read.
    """
    from kabrn_dist.data.run_config import load_run_config

    return load_run_config(options.config, options.set)


def print_plan(config: Config, world_size: int | None) -> int:
    """Print the plan of a configuration.

    Args:
        config: the configuration.
        world_size: number of processes; None takes the launcher's, or 1.

    Returns:
        The exit code, 0.

    Raises:
        UserError: for a configuration that does not fit the processes, or data that cannot be used.
    """
    import torch

    from kabrn_dist.config.idle import list_idle_settings
    from kabrn_dist.distributed.launch_env import read_number
    from kabrn_dist.planner.estimate import describe_plan
    from kabrn_dist.planner.memory import MAX_PLANNED_BYTES, check_memory, process_memory
    from kabrn_dist.train.datasets import describe_cut_documents, describe_repetition, open_datasets

    is_here = world_size is None
    world_size = world_size or read_number("WORLD_SIZE", 1)
    _check_world_size(config, world_size, is_here)
    # Other machines may have more memory than this one, but not without end.
    available = process_memory(torch.device("cpu"), world_size) if is_here else float(MAX_PLANNED_BYTES)
    check_memory(
        config, world_size, available, "this machine" if is_here else "the largest machine that can be planned for"
    )
    print(describe_plan(config, world_size))
    for line in list_idle_settings(config, world_size):
        print(f"warning: {line}")
    datasets = open_datasets(config)
    print(_describe_data(datasets, config))
    if warning := describe_repetition(config, datasets.train):
        print(warning)
    for line in describe_cut_documents(datasets.train):
        print(line)
    print("nothing was started or written")
    return 0


def _check_world_size(config: Config, world_size: int, is_default: bool) -> None:
    try:
        config.check_world_size(world_size)
    except UserError as error:
        if is_default:
            raise UserError(f"{error}; --world N plans for N processes") from error
        raise


def _describe_data(datasets: Datasets, config: Config) -> str:
    train, corpus = datasets.train, datasets.train.corpus
    total = config.training.steps * config.training.global_batch_size
    lines = [
        f"data                 {corpus.num_tokens('train'):,} training tokens = {train.num_sequences:,} sequences, "
        f"{total / train.num_sequences:.2f} epochs; {corpus.num_tokens('validation'):,} validation tokens"
    ]
    if len(train.sequences_per_source) > 1:
        for name, count, drawn in zip(
            corpus.names, train.sequences_per_source, train.sequences_drawn(total), strict=True
        ):
            epochs = f", {drawn / count:.2f} epochs" if count else ""
            lines.append(f"  {name:<19}{count:,} sequences, {drawn / total:.1%} of all that are read{epochs}")
    return "\n".join(lines)
