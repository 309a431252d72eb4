"""Grow a trained run into a larger configuration: more experts, mixtures for dense layers, finer grids.

Writes step 0 of the new run, whose training then starts as usual:

  dense layer → mixture    model.experts.num_dense_layers or every lowered; hidden as wide as the dense layer was.
                           Experts are copies of it, the router is new; shared experts start by adding nothing.
  E → m·E routed experts   model.experts.num_experts multiplied; a token visits all copies of its experts (top_k multiplied
                           too) or one (router.n_group multiplied, router.topk_group 1).
  grid G → m·G             model.experts.grid_size multiplied, for the forms hat and bspline.

Everything else of the model's shape stays. Weights and both of AdamW's moments are carried over; data, schedule and
step start anew. The same happens without this command where the new configuration has run.init_from: RUN.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kabrn_dist.config.file import load_config
from kabrn_dist.utils.errors import UserError

EXAMPLES = """examples:
  python launch/grow.py --from runs/dense --config moe.yaml --dry-run
  python launch/grow.py --from runs/dense --config moe.yaml --redraw 0.5
  python launch/grow.py --from runs/tiny --config configs/tiny.yaml --set run.folder=runs/wide \\
      --set model.experts.num_experts=16 --set model.experts.top_k=4
then:
  deepspeed --num_gpus 2 launch/train.py --config moe.yaml
"""


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(options.config, options.set)
        # A mistake in the configuration is reported before torch is imported.
        from kabrn_dist.grow.describe import describe_growth
        from kabrn_dist.grow.run import grow, plan_growth

        print(describe_growth(plan_growth(options.source, config), options.noise, options.redraw))
        if options.dry_run:
            print("nothing was written (--dry-run)")
        else:
            print(f"wrote {grow(options.source, config, options.noise, options.redraw)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="source", required=True, type=Path, metavar="RUN", help="the trained run's folder"
    )
    parser.add_argument("--config", required=True, type=Path, help="the new run's YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override one of its values; may be repeated"
    )
    parser.add_argument(
        "--noise",
        type=float,
        metavar="SHARE",
        help="noise on copies, relative to the weights' size, so that they part (default: 0.01 for copies of experts; "
        "0 for copies of dense layers, which part as the new router sends them other tokens)",
    )
    parser.add_argument(
        "--redraw",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="draw so many of each copy's hidden units anew; the loss rises at first and falls lower later according "
        "to drop-upcycling (arXiv 2502.19261), which uses 0.5 (default 0)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print what would become of each tensor, and end")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
