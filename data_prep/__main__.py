"""`python -m data_prep` is `mixkabrn prepare`, and `python -m data_prep inspect` is `mixkabrn inspect`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kabrn_dist.cli import main as cli


def main(arguments: Sequence[str]) -> int:
    """Run `mixkabrn prepare` with these options, or `mixkabrn inspect` if they begin with `inspect`."""
    command = [] if arguments[:1] == ["inspect"] else ["prepare"]
    return cli.main([*command, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
