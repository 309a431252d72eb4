"""`mixkabrn report`: tables and figures of what a run has learned."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kabrn_dist.cli.arguments import Subparsers, add_command, add_run_folder, given_path, positive_int, whole_number

if TYPE_CHECKING:
    from rich.console import Console

# Width of tables in a pipe or a file; a terminal has its own.
FILE_WIDTH = 200

DESCRIPTION = """Prints tables to the terminal, and writes figures and JSON to the folder report/ of the run. The run
may still be training."""

EXAMPLES = """  mixkabrn report experts runs/tiny
  mixkabrn report functions runs/tiny
  mixkabrn report symbolic runs/tiny --layer 0 --expert 3
  mixkabrn report weights runs/tiny
"""

EXPERTS = """Reads log.jsonl. One row per layer: largest and smallest load relative to the ideal, its standard
deviation (CV), how far the largest exceeds the ideal (MaxVio), experts without tokens and nearly so, the router's
entropy, the range of its bias, dropped tokens; per rank, the tokens that arrived, the MiB sent and the time spent in
the exchange.

Writes load.png (layer × expert), maxvio.png (over the steps) and load_layer_N.png (each expert over the steps)."""

FUNCTIONS = """Compares the functions of the newest checkpoint with those of the initial weights.

Writes functions_layer_N_routed.png (and _shared, _dense): one panel per expert, one curve per function, the initial
one dashed, the range shaded; change.png, how far functions have moved since the start; and outside.png, the fraction of
the inputs outside the range, on sequences of the validation split."""

SYMBOLIC = """Fits c·f(a·x + b) + d to each learned function, as pykan's suggest_symbolic does, and prints the best with
the fraction of the variance that it explains (R²). Writes symbolic.json with the five best of each."""

WEIGHTS = """Reads the newest checkpoint. One row per matrix: fractions of −1, 0 and +1, distance of the latent weights
from the threshold between codes, the scale, and the fraction of codes that differ from those of the initial weights.

Writes weights_layer_N.png: for each matrix a histogram of its latent weights over the map of its codes."""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn report` and its four kinds."""
    parser = add_command(
        subparsers,
        "report",
        run_experts,
        "show expert loads, learned functions, ternary weights",
        DESCRIPTION,
        EXAMPLES,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="experts|functions|symbolic|weights")
    experts = add_command(kinds, "experts", run_experts, "how the routers distribute tokens over experts", EXPERTS)
    functions = add_command(kinds, "functions", run_functions, "the learned univariate functions", FUNCTIONS)
    symbolic = add_command(
        kinds, "symbolic", run_symbolic, "elementary functions nearest to the learned ones", SYMBOLIC
    )
    weights = add_command(kinds, "weights", run_weights, "the ternary weights", WEIGHTS)
    for kind in (experts, functions, symbolic, weights):
        add_run_folder(kind)
    experts.add_argument(
        "--last",
        type=positive_int,
        default=10,
        metavar="N",
        help="steps averaged in the second table (default 10)",
    )
    experts.add_argument(
        "--layer", type=whole_number, metavar="N", help="layer of load_layer_N.png (default: the least balanced)"
    )
    for kind in (functions, symbolic):
        kind.add_argument(
            "--edges",
            type=positive_int,
            default=4,
            metavar="N",
            help="functions per expert to read if each edge has its own: types hat and bspline (default 4)",
        )
    functions.add_argument(
        "--sequences", type=positive_int, default=16, metavar="N", help="validation sequences to run (default 16)"
    )
    symbolic.add_argument("--layer", type=whole_number, metavar="N", help="only this layer (default: all)")
    symbolic.add_argument("--expert", type=whole_number, metavar="N", help="only this expert (default: all)")
    weights.add_argument(
        "--out", type=given_path, metavar="DIR", help="folder of the figures (default: report/ in the run's folder)"
    )


def run_experts(options: argparse.Namespace) -> int:
    """Report the experts' loads; return the exit code."""
    with _open_console(options.folder) as console:
        from kabrn_dist.analysis.experts import report_experts

        report_experts(options.folder, options.last, options.layer, console)
    return 0


def run_functions(options: argparse.Namespace) -> int:
    """Report the learned functions; return the exit code."""
    with _open_console(options.folder, "config.yaml") as console:
        from kabrn_dist.analysis.functions import report_functions

        report_functions(options.folder, options.edges, options.sequences, console)
    return 0


def run_symbolic(options: argparse.Namespace) -> int:
    """Report the nearest elementary functions; return the exit code."""
    with _open_console(options.folder, "config.yaml") as console:
        from kabrn_dist.analysis.symbolic_report import report_symbolic

        report_symbolic(options.folder, options.edges, options.layer, options.expert, console)
    return 0


def run_weights(options: argparse.Namespace) -> int:
    """Report the ternary weights; return the exit code."""
    with _open_console(options.folder, "config.yaml") as console:
        from kabrn_dist.analysis.weights import report_weights

        report_weights(options.folder, options.out, console)
    return 0


@contextmanager
def _open_console(folder: Path, file: str | None = None) -> Iterator[Console]:
    """A console that says what is being done, for a run's folder that holds a file."""
    from rich.console import Console

    from kabrn_dist.inference.folder import check_run_folder

    check_run_folder(folder, file)
    # A pipe or a file gets whole lines; only a terminal is wrapped to its width.
    console = Console(width=None if Console().is_terminal else FILE_WIDTH, highlight=False, markup=False)
    with console.status(f"reading {folder}, then drawing …"):
        yield console
