"""The runtime on emulated machines: the same sums, tokens, logits and states, also with adapters, as on this one.

What Debian calls gcc-i686-linux-gnu, gcc-arm-linux-gnueabihf, gcc-aarch64-linux-gnu, gcc-s390x-linux-gnu,
gcc-riscv64-linux-gnu and qemu-user is used if it is there. The compilers of the Python package ziglang do not stand in
for them: the `rint` of their library for i686 does not round, and its exponentials differ in the last digit.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from kabrn_dist.kernels.build import KernelUnavailable, find_compiler
from kabrn_dist.runtime.build import CSRC
from tests.support.models import write_model_kinds
from tests.support.native_adapters import write_adapters

PROBE = Path(__file__).with_name("probe.c")
# Each stands for other code: functions, splines, caches, scales, fp32 and fp16 matrices.
KINDS = ("rational", "chebyshev", "bspline", "swiglu", "hybrid", "scale groups", "router groups", "plain")
# Twice as many random cases.
CASES = 5000


class Machine(NamedTuple):
    gcc: str
    emulator: list[str]
    kernels: set[str]


MACHINES = {
    # SSE, but not SSE2.
    "pentium3": Machine("i686-linux-gnu-gcc", ["qemu-i386", "-cpu", "pentium3"], {"scalar"}),
    "core2duo": Machine(
        "x86_64-linux-gnu-gcc",
        ["qemu-x86_64", "-cpu", "core2duo"],
        {"ssse3", "sse2", "scalar"},
    ),
    "armhf": Machine("arm-linux-gnueabihf-gcc", ["qemu-arm"], {"scalar"}),
    "cortex-a53": Machine("aarch64-linux-gnu-gcc", ["qemu-aarch64", "-cpu", "cortex-a53"], {"neon", "scalar"}),
    "aarch64": Machine("aarch64-linux-gnu-gcc", ["qemu-aarch64"], {"dotprod", "neon", "scalar"}),
    "s390x": Machine("s390x-linux-gnu-gcc", ["qemu-s390x"], {"scalar"}),
    "riscv64": Machine("riscv64-linux-gnu-gcc", ["qemu-riscv64"], {"scalar"}),
}


def compile_probe(compiler: list[str], program: Path) -> str:
    """Return what went wrong, "" for nothing."""
    command = [*compiler, "-O2", f"-I{CSRC}", str(PROBE), "-o", str(program), "-lm", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return done.stderr if done.returncode else ""


def find_cross_compiler(machine: Machine) -> list[str] | None:
    if shutil.which(machine.gcc):
        return [machine.gcc, "-static"]
    return None


def run_probe(command: list[str], *arguments: str) -> str:
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = write_model_kinds(tmp_path_factory.mktemp("models"), KINDS)
    for path in paths:
        write_adapters(path)
    return list(map(str, paths))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, models: list[str]) -> dict[str, str]:
    """What this machine computes."""
    program = tmp_path_factory.mktemp("native") / "probe"
    try:
        problem = compile_probe([find_compiler()], program)
    except KernelUnavailable as error:
        pytest.skip(str(error))
    assert not problem, problem
    return {
        "logits": run_probe([str(program)], "logits", *models),
        "selftest": run_probe([str(program)], "selftest", str(CASES)),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, models: list[str]) -> Iterator[dict[str, Future[dict[str, str]]]]:
    """What the machines compute: two of them at a time, while the tests wait for the first."""
    folder = tmp_path_factory.mktemp("programs")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(emulate, name, folder / name, models) for name in MACHINES}


def emulate(name: str, program: Path, models: list[str]) -> dict[str, str]:
    """Compile for a machine and run there; {"skip": reason} if a tool is missing."""
    machine = MACHINES[name]
    compiler = find_cross_compiler(machine)
    if not shutil.which(machine.emulator[0]):
        return {"skip": f"{machine.emulator[0]} is not installed; Debian has it in qemu-user"}
    if compiler is None:
        return {"skip": f"{machine.gcc} is not installed; Debian has it"}
    problem = compile_probe(compiler, program)
    assert not problem, problem
    command = [*machine.emulator, str(program)]
    return {"logits": run_probe(command, "logits", *models), "selftest": run_probe(command, "selftest", str(CASES))}


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_computes_the_same_bits(
    name: str, native: dict[str, str], results: dict[str, Future[dict[str, str]]]
) -> None:
    found = results[name].result()
    if "skip" in found:
        pytest.skip(found["skip"])
    assert found["logits"] == native["logits"]
    *tested, digest = found["selftest"].splitlines()
    ran = {line.split()[0] for line in tested if "not supported" not in line}
    assert ran == MACHINES[name].kernels
    assert all("ok:" in line or "not supported" in line for line in tested)
    # Of all sums.
    assert digest == native["selftest"].splitlines()[-1] and digest.startswith("digest")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are those of x86-64")
def test_all_kernels_of_this_machine_compute_the_same_bits(
    models: list[str], native: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not compile_probe([find_compiler()], tmp_path / "probe")
    supported = [line.split()[0] for line in native["selftest"].splitlines() if "ok:" in line]
    for kernels in supported:
        monkeypatch.setenv("MIXKABRN_KERNELS", kernels)
        assert run_probe([str(tmp_path / "probe")], "logits", *models) == native["logits"], kernels


def test_a_strict_compiler_has_nothing_to_say(tmp_path: Path) -> None:
    compilers = [[name] for name in ("gcc", "clang") if shutil.which(name)]
    if not compilers:
        pytest.skip("neither gcc nor clang is installed")
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only"]
    for compiler in compilers:
        for defined in ("MIXKABRN_LIBRARY", "MIXKABRN_NO_THREADS"):
            command = [*compiler, *flags, f"-D{defined}", str(CSRC / "mixkabrn.c")]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == 0 and not done.stderr, done.stderr
