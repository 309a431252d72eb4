"""Python environments without this package, for tests of what others run: exports for Hugging Face, lm-eval.

An environment has the packages that it asks for, the torch and numpy of this interpreter as links, and nothing else.
It is made once, under the folder of the virtual environment, and stays there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

ENVIRONMENTS = Path(sys.prefix) / "environments"
# Distributions that are linked, for their size, instead of installed again.
LINKED = ("torch", "numpy")
# Words in pip's complaint when no index could be asked.
_UNREACHABLE = ("from versions: none", "Could not fetch URL", "Failed to establish", "timed out", "Connection refused")
_INSTALL_SECONDS = 600


def make_environment(name: str, requirements: Sequence[str]) -> Path:
    """Return the folder of an environment with `requirements`, made if it is not there yet.

    Skips the calling test, with the reason, if PyPI cannot be reached.

    Args:
        name: of the folder, which other requirements of that name do not share.
        requirements: as for `pip install`.

    Raises:
        RuntimeError: if pip refuses for another reason; its words are in the message.
    """
    pinned = [f"{linked}=={metadata.version(linked)}" for linked in LINKED]
    asked = [*pinned, *requirements]
    digest = hashlib.sha256("\n".join([platform.python_version(), *asked]).encode()).hexdigest()[:8]
    folder = ENVIRONMENTS / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    ENVIRONMENTS.mkdir(exist_ok=True)
    with _locked(ENVIRONMENTS / f"{folder.name}.lock"):
        if not folder.is_dir():
            _build(folder, asked, pinned)
    return folder


def interpreter(environment: Path) -> Path:
    """Return the Python of an environment."""
    return environment / "bin" / "python"


def run_in_environment(
    environment: Path,
    arguments: Sequence[str | Path],
    home: Path,
    timeout: float = 120,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python, isolated from this process's paths and packages and from the network's model hubs.

    Args:
        environment: made by `make_environment`.
        arguments: of Python, e.g. a script and its arguments, or "-m" and a module.
        home: a folder for caches, such as `tmp_path`; also the working folder.
        timeout: in seconds.
        variables: further environment variables.

    Returns:
        What it printed, and its exit code.
    """
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS"))
    }
    settings = {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [interpreter(environment), "-I", *arguments],
        cwd=home,
        env=inherited | settings | dict(variables or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _build(folder: Path, asked: Sequence[str], pinned: Sequence[str]) -> None:
    """Make the environment beside its place, and move it there when it is complete."""
    with tempfile.TemporaryDirectory(dir=ENVIRONMENTS, prefix=f"{folder.name}.") as temporary:
        draft = Path(temporary) / folder.name
        venv.create(draft, with_pip=False, symlinks=True)
        packages = next(draft.glob("lib/python*/site-packages"))
        for linked in LINKED:
            _link(linked, packages)
        constraints = Path(temporary) / "constraints.txt"
        # Were another version installed over a link, pip would remove the files that it points to.
        constraints.write_text("\n".join(pinned) + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(interpreter(draft)), "install", "--quiet"]
        result = subprocess.run(
            [*pip, "--no-compile", "--no-warn-script-location", "--constraint", str(constraints), *asked],
            capture_output=True,
            text=True,
            timeout=_INSTALL_SECONDS,
            check=False,
        )
        if result.returncode:
            if any(words in result.stderr for words in _UNREACHABLE):
                pytest.skip(f"PyPI cannot be reached: {result.stderr.strip().splitlines()[-1]}")
            raise RuntimeError(f"pip install {' '.join(asked)}: {result.stderr.strip()}")
        shutil.move(draft, folder)


def _link(distribution: str, packages: Path) -> None:
    """Link every top-level folder and file of a distribution that this interpreter has."""
    found = metadata.distribution(distribution)
    for name in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
        (packages / name).symlink_to(Path(str(found.locate_file(name))).resolve())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for, and hold, the lock of a file: several test processes may want the same environment."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
