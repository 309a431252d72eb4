"""`mixkabrn export`: a run's checkpoint as one folder of safetensors."""

from __future__ import annotations

import argparse

from kabrn_dist.cli.arguments import Subparsers, add_command, add_run_folder, given_path, whole_number

DESCRIPTION = """Writes model.safetensors (several files if the model is large), config.yaml, tokenizer.json and
README.md to OUT, to publish, to evaluate, or to generate from. OUT appears complete or not at all, and needs neither
the run nor the shards. No process group is started, and no whole tensor is held in memory."""

EXAMPLES = """  mixkabrn export runs/tiny exports/tiny
  mixkabrn export runs/tiny exports/tiny-fp32 --dtype fp32 --step 1200
  mixkabrn export runs/tiny exports/tiny --dry-run
  mixkabrn generate exports/tiny --prompt "def "
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn export`."""
    parser = add_command(
        subparsers, "export", run, "write a run's checkpoint as one folder of safetensors", DESCRIPTION, EXAMPLES
    )
    add_run_folder(parser)
    parser.add_argument("out", type=given_path, metavar="OUT", help="folder to write; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=("trained", "bf16", "fp32"),
        default="trained",
        help="dtype of the weights: as the trainer computes with them, so that ternary codes and scales are the "
        "trainer's (default); bf16 takes half of fp32's bytes; fp32 has the weights that the optimizer updates, to go "
        "on training elsewhere. In another dtype than the trainer's, its codes and scales are written too",
    )
    parser.add_argument(
        "--step", type=whole_number, metavar="N", help="step of the checkpoint (default: the newest intact one)"
    )
    parser.add_argument("--dry-run", action="store_true", help="verify the checkpoint and print what would be written")


def run(options: argparse.Namespace) -> int:
    """Export, or with --dry-run print what would be written; return the exit code."""
    from kabrn_dist.inference.folder import check_run_folder

    check_run_folder(options.folder, "config.yaml")
    import torch

    from kabrn_dist.inference.export import plan_export, write_export

    dtype = {"trained": None, "bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    export = plan_export(options.folder, dtype, options.step)
    summary = (
        f"{export.num_parameters:,} parameters in {export.describe_dtype()}, {export.num_bytes:,} bytes "
        f"({len(export.files)} files)"
    )
    if options.dry_run:
        print(f"would write {summary} from {export.path} to {options.out}")
        return 0
    write_export(export, options.out, lambda file: print(f"wrote {file}"))
    print(f"{options.out}: {summary} from {export.path}")
    return 0
