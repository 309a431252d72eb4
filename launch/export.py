"""Export a run: `mixkabrn export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# A checkout of the sources need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kabrn_dist.cli.shim import run_script


def main(arguments: Sequence[str]) -> int:
    """Run the command with this script's flags; return the exit code."""
    return run_script(["export"], ("--run", "--out"), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
