"""Recognize mpirun as the launcher, and import mpi4py only then."""

from __future__ import annotations

import os
from typing import Any

from kabrn_dist.utils.errors import UserError


def is_under_mpirun() -> bool:
    """Return whether an MPI launcher started this process."""
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))


def import_mpi() -> Any:
    """Return the module `mpi4py.MPI`. Importing it initializes MPI.

    Raises:
        UserError: mpi4py is not installed.
    """
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError("started by mpirun, but mpi4py is not installed; pip install mpi4py mpich") from None
    return MPI
