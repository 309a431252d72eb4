"""Damaged models, adapters and states, with AddressSanitizer and UBSan: refused or read, but no crash, leak or hang."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.kernels.build import KernelUnavailable, find_compiler
from kabrn_dist.runtime.build import CSRC
from kabrn_dist.runtime.model_file import write_model_file
from tests.support.models import MODEL_KINDS, make_model, make_model_config
from tests.support.native_adapters import write_adapters

DRIVER = Path(__file__).with_name("fuzz.c")
KINDS = ("rational", "bspline", "swiglu", "hybrid", "scale groups", "router groups", "plain")
# What a file of 100 kB asks for beyond this is refused by the sanitizer's allocator, and so by the runtime.
LIMITS = "allocator_may_return_null=1:max_allocation_size_mb=4096"


def compile_fuzzer(target: Path) -> bool:
    """Compile with as many checks as the compiler knows; False if it knows none."""
    try:
        compiler = find_compiler()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    # -O1: a sanitizer's build at -O2 takes a minute.
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]
    command = [compiler, *flags, str(DRIVER), "-o", str(target), "-lm", "-lpthread"]
    return subprocess.run(command, capture_output=True, check=False, timeout=600).returncode == 0


@pytest.mark.slow
def test_damaged_files_and_states_do_no_harm(tmp_path: Path) -> None:
    if not compile_fuzzer(tmp_path / "fuzz"):
        pytest.skip("the compiler has no -fsanitize=address,undefined")
    for kind in KINDS:
        config = make_model_config(*MODEL_KINDS[kind])
        model = make_model(config)
        write_model_file(model, config, Tokenizer.of_bytes(), 3, tmp_path / f"{kind}.mkb")
        write_adapters(tmp_path / f"{kind}.mkb")
    # Each model, and then its adapters.
    files = sorted(map(str, [*tmp_path.glob("*.mkb"), *tmp_path.glob("*.mka")]))
    environment = {**os.environ, "ASAN_OPTIONS": LIMITS}
    command = [str(tmp_path / "fuzz"), "1", "3000", *files]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.fullmatch(r"3000 inputs, (\d+) accepted, (\d+) adapters used\n", done.stdout)
    assert found and int(found[1]) > 100 and int(found[2]) > 100, done.stdout
