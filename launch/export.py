"""Write a run's checkpoint as one folder of safetensors, to publish, to evaluate, or to generate from.

No process group is started, whatever layout trained the run, and no whole tensor is held in memory. The folder appears
whole or not at all, and needs neither the run nor the shards any more."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kabrn_dist.utils.errors import UserError

EXAMPLES = """examples:
  python launch/export.py --run runs/tiny --out exports/tiny
  python launch/export.py --run runs/tiny --out exports/tiny-fp32 --dtype fp32 --step 1200
  python launch/export.py --run runs/tiny --out exports/tiny --dry-run
  python launch/generate.py --model exports/tiny --prompt "def "
"""


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    import torch

    from kabrn_dist.inference.export import plan_export, write_export

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    try:
        export = plan_export(options.run, dtype, options.step)
        what = (
            f"{export.parameters:,} parameters in {options.dtype}, {export.bytes:,} bytes ({len(export.files)} files)"
        )
        if options.dry_run:
            print(f"would write {what} from {export.path} to {options.out}")
            return 0
        write_export(export, options.out, lambda file: print(f"wrote {file}"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {what} from {export.path}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, type=Path, help="the run's folder")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write, which must not exist")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights; fp32 is exact (default bf16)"
    )
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest intact one)")
    parser.add_argument("--dry-run", action="store_true", help="verify and say what would be written")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
