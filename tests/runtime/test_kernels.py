"""Every set of kernels of this machine equals the scalar ones; others are refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from kabrn_dist import __version__
from kabrn_dist.runtime.native_library import load_native_library


def run_native(program: Path, *arguments: str, kernels: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments],
        env={**os.environ, "MIXKABRN_KERNELS": kernels},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_all_kernels_equal_the_scalar_ones(native_program: Path) -> None:
    done = run_native(native_program, "selftest")
    *lines, digest = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and digest.startswith("digest")
    assert lines[-1].startswith("scalar") and all(" ok: " in line or "not supported" in line for line in lines)
    assert "WRONG" not in done.stdout


def test_unknown_kernels_are_refused_in_one_line(native_program: Path, tmp_path: Path) -> None:
    done = run_native(native_program, "bench", str(tmp_path / "none.mkb"), kernels="abacus")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "MIXKABRN_KERNELS=abacus" in done.stderr and "scalar" in done.stderr


def test_the_runtime_has_the_version_of_the_package(native_program: Path) -> None:
    assert load_native_library().mkb_version().decode() == __version__
    assert __version__ in run_native(native_program, "--version").stdout
