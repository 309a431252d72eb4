"""The wheel, installed where the repository is not: from text to generated text with the command alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from tests.support.runs import ROOT, SMALL_CONFIG


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, offline: a build leaves files beside them."""
    sources = folder / "sources"
    sources.mkdir()
    for name in ("kabrn_dist", "data_prep"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sources)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path) -> Path:
    """Install the wheel in a new environment that sees this one's packages, but not its editable installs."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # A folder named in a .pth file is searched, but .pth files inside it, such as an editable install's, are not read.
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*command, "--ignore-installed", str(wheel)], check=True)
    return folder / "bin"


@pytest.mark.slow
def test_the_installed_command_goes_from_text_to_text(tmp_path: Path) -> None:
    programs = install_wheel(build_wheel(tmp_path), tmp_path / "environment")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    hidden = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def mixkabrn(*arguments: str) -> str:
        return run(str(programs / "mixkabrn"), *arguments)

    code = "import kabrn_dist, data_prep; print(kabrn_dist.__file__, data_prep.__file__, kabrn_dist.__version__)"
    *files, version = run(str(programs / "python"), "-c", code).split()
    assert all(file.startswith(str(tmp_path / "environment")) for file in files)
    assert mixkabrn("--version") == f"mixkabrn {version}\n"

    text = Path(sysconfig.get_path("stdlib"), "textwrap.py").read_text(encoding="utf-8")
    for number in range(6):
        (folder / f"{number}.txt").write_text(text[number * 3000 : (number + 1) * 3000])
    texts = sorted(str(path) for path in folder.glob("*.txt"))
    options = ["--tokenizer", "bytes", "--validation-share", "0.2"]
    assert "wrote shards" in mixkabrn("prepare", "--source", "text", "--input", *texts, "--out", "shards", *options)
    assert "all shards verified" in mixkabrn("inspect", "shards")
    data = SMALL_CONFIG["data"] | {"path": "shards"}
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL_CONFIG | {"run": {"folder": "runs/small"}, "data": data}))
    assert "parameters" in mixkabrn("plan", "small.yaml", "--world", "2")
    mixkabrn("train", "small.yaml", "--set", "training.steps=3")
    assert mixkabrn("generate", "runs/small", "--prompt", "def ", "--tokens", "5").startswith("def ")
    mixkabrn("export", "runs/small", "exports/small", "--dtype", "fp32")
    assert mixkabrn("generate", "exports/small", "--prompt", "def ", "--tokens", "5").startswith("def ")
    assert "experts" in mixkabrn("report", "experts", "runs/small")
    assert (folder / "runs" / "small" / "report" / "load.png").exists()
    assert "top_k" in mixkabrn("config", "model.experts")
    code = "from kabrn_dist.runtime.server.app import CHAT_PAGE; print(CHAT_PAGE.read_text())"
    assert "<title>" in run(str(programs / "python"), "-c", code)
    packed = mixkabrn("pack", "exports/small", "--out", "pi/small.mkb", "--sources")
    assert "next: mixkabrn chat pi/small.mkb" in packed
    run("cc", "-O2", "pi/mixkabrn.c", "-o", "pi/mixkabrn", "-lm", "-lpthread")
    assert run("pi/mixkabrn", "generate", "pi/small.mkb", "--prompt", "def ", "--tokens", "5").startswith("def ")
