"""`mixkabrn grow`: turn a trained run into the start of a larger one."""

from __future__ import annotations

import argparse

from kabrn_dist.cli.arguments import Subparsers, add_command, add_config, add_run_folder, number
from kabrn_dist.cli.plan import load

DESCRIPTION = """Writes step 0 of the run that CONFIG describes, from the newest checkpoint of RUN:

  dense layer → experts    model.experts.num_dense_layers or moe_layer_interval lowered, expert_hidden_size equal to
                           the dense layer's. Experts are copies of it, the router is new; the output of shared
                           experts starts at zero.
  E → m·E routed experts   model.experts.num_experts multiplied. Either a token visits all copies of its experts
                           (top_k multiplied as well) or one of them (router.n_group multiplied, topk_group 1).
  grid G → m·G             model.experts.grid_size multiplied, for the types hat and bspline.

All other shapes of the model stay. Weights and both moments of AdamW are carried over; data, schedule and step start
from the beginning. A configuration with run.init_from: RUN does the same when its training starts."""

EXAMPLES = """  mixkabrn grow runs/dense moe.yaml --dry-run
  mixkabrn grow runs/dense moe.yaml --redraw 0.5
  mixkabrn grow runs/tiny configs/tiny.yaml --set run.folder=runs/wide \\
      --set model.experts.num_experts=16 --set model.experts.top_k=4
  mixkabrn train moe.yaml
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn grow`."""
    parser = add_command(
        subparsers,
        "grow",
        run,
        "grow a trained run: more experts, experts for dense layers, finer grids",
        DESCRIPTION,
        EXAMPLES,
    )
    add_run_folder(parser)
    add_config(parser, "YAML file of the new run")
    parser.add_argument(
        "--noise",
        type=number,
        metavar="X",
        help="standard deviation of the noise on copies, relative to the weights, so that copies diverge (default: "
        "0.01 for copies of experts; 0 for copies of dense layers, to which the new router sends different tokens)",
    )
    parser.add_argument(
        "--redraw",
        type=number,
        default=0.0,
        metavar="X",
        help="fraction of each copy's hidden units to initialize again. The loss rises at first and falls lower later, "
        "according to drop-upcycling (arXiv 2502.19261), which uses 0.5 (default 0)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would become of each tensor and stop")


def run(options: argparse.Namespace) -> int:
    """Grow, or with --dry-run print the plan; return the exit code."""
    # A mistake in the configuration is reported before torch is imported.
    config = load(options)
    from kabrn_dist.grow.describe import describe_growth
    from kabrn_dist.grow.run import grow, plan_growth

    print(describe_growth(plan_growth(options.folder, config), options.noise, options.redraw))
    if options.dry_run:
        print("nothing was written (--dry-run)")
    else:
        print(f"wrote {grow(options.folder, config, options.noise, options.redraw)}")
    return 0
