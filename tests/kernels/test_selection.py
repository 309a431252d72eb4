"""Where there is a compiler, there are kernels: other tests of kernels skip what is not there."""

from __future__ import annotations

import os
import shutil

import pytest

from kabrn_dist.kernels.selection import ENV_SWITCH, select_kernels


@pytest.mark.skipif(shutil.which("gcc") is None or ENV_SWITCH in os.environ, reason="no gcc, or kernels are chosen")
def test_all_kernels_compile() -> None:
    kernels, reason = select_kernels("cpu")
    assert kernels is not None, reason
