"""`python -m kabrn_dist` is the command `mixkabrn`, also for launchers: `torchrun -m kabrn_dist train CONFIG`."""

from __future__ import annotations

import sys

from kabrn_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
