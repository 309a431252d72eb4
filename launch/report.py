"""Read what a run has to tell: how experts are used, which functions were learned and their names, ternary weights."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from kabrn_dist.utils.errors import UserError

EXAMPLES = """examples:
  python launch/report.py experts --run runs/tiny
  python launch/report.py functions --run runs/tiny
  python launch/report.py symbolic --run runs/tiny --layer 0 --expert 3
  python launch/report.py weights --run runs/tiny

Tables go to the terminal, pictures and JSON to the run's folder, in report/. The run may still be training.
"""

EXPERTS = """How the routers spread their tokens. From log.jsonl, one row a layer with the largest and smallest load
over the ideal, CV, MaxVio, dead and nearly dead experts, the router's entropy, the range of its bias, dropped copies,
and of each rank the copies that arrived, the MiB it sent and the time it spent in the exchange.

Draws load.png (layer × expert), maxvio.png (over the steps) and load_layer_N.png (each expert over the steps)."""

FUNCTIONS = """The learned univariate functions of the newest checkpoint, beside those of the initial weights.

Draws functions_layer_N_routed.png (and _shared, _dense): a panel an expert, a curve a function, the start dashed, the
range shaded; change.png, how far functions have moved since the start; and outside.png, the share of the inputs that
leave the range, on sequences of the validation split."""

SYMBOLIC = """The elementary function nearest to each learned one, c·f(a·x + b) + d, with the share of the variance that
it explains (R²), as pykan's suggest_symbolic. Writes symbolic.json with the five best of each."""

WEIGHTS = """The ternary weights of the newest checkpoint. One row a matrix: shares of −1, 0 and +1, how far latents
are from the threshold between codes, the scale, and the share of codes that are not those of the initial weights.

Draws weights_layer_N.png: for each matrix a histogram of its latents over the map of its codes."""


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # A pipe or a file gets whole lines; only a terminal is folded to its width.
    console = Console(width=None if Console().is_terminal else 200, highlight=False, markup=False)
    try:
        if options.what == "experts":
            from kabrn_dist.analysis.experts import report_experts

            report_experts(options.run, options.last, options.layer, console)
        elif options.what == "functions":
            from kabrn_dist.analysis.functions import report_functions

            report_functions(options.run, options.edges, options.sequences, console)
        elif options.what == "weights":
            from kabrn_dist.analysis.weights import report_weights

            report_weights(options.run, options.out, console)
        else:
            from kabrn_dist.analysis.symbolic_report import report_symbolic

            report_symbolic(options.run, options.edges, options.layer, options.expert, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="experts|functions|symbolic|weights")
    texts = {"experts": EXPERTS, "functions": FUNCTIONS, "symbolic": SYMBOLIC, "weights": WEIGHTS}
    parts = {
        name: kinds.add_parser(name, help=text.split(".")[0], description=text, formatter_class=raw)
        for name, text in texts.items()
    }
    for part in parts.values():
        part.add_argument("--run", required=True, type=Path, help="the run's folder")
    last = "logged steps that the second table averages (default 10)"
    parts["experts"].add_argument("--last", type=count, default=10, metavar="N", help=last)
    layer = "whose experts are drawn over the steps (default: the least balanced)"
    parts["experts"].add_argument("--layer", type=int, metavar="N", help=layer)
    edges = "functions of an expert that are read where every edge has its own: hat, bspline (default 4)"
    for name in ("functions", "symbolic"):
        parts[name].add_argument("--edges", type=count, default=4, metavar="N", help=edges)
    sequences = "validation sequences that are run through the model (default 16)"
    parts["functions"].add_argument("--sequences", type=count, default=16, metavar="N", help=sequences)
    parts["symbolic"].add_argument("--layer", type=int, metavar="N", help="this layer only")
    parts["symbolic"].add_argument("--expert", type=int, metavar="N", help="this expert only")
    out = "where pictures are written (default: the run's folder, report/)"
    parts["weights"].add_argument("--out", type=Path, metavar="FOLDER", help=out)
    return parser.parse_args(arguments)


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
