"""Standard streams that are closed, full, or lead to a reader that has gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kabrn_dist.checkpoint.layout import list_checkpoints
from tests.support.runs import ROOT, make_shards, write_small_config

COMMAND = f"{sys.executable} -m kabrn_dist"


def run_shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd=ROOT, check=False, capture_output=True, text=True, timeout=120)


def test_a_closed_stream_is_not_taken_by_the_next_file(tmp_path: Path) -> None:
    code = (
        "import sys; from kabrn_dist.utils.terminal import open_closed_streams; open_closed_streams(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('lost'); print('lost', file=sys.stderr); "
        "sys.exit(file.fileno())"
    )
    done = run_shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-')
    assert done.returncode > 2 and (tmp_path / "file").read_text() == ""


@pytest.mark.slow
def test_a_full_stdout_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some words. " * 200)
    prepare = f"{COMMAND} prepare --source text --tokenizer bytes --input {tmp_path}/in.txt --out {tmp_path}/set"
    for command in (prepare, f"{COMMAND} config"):
        done = run_shell(f"{command} > /dev/full")
        assert done.returncode == 2, done.stderr
        assert done.stderr == "error: stdout cannot be written to (No space left on device); make room for it\n"
    # Closed streams are no reason to end, and the same command goes on where it was.
    assert run_shell(f"{prepare} >&- 2>&-").returncode == 0 and (tmp_path / "set" / "index.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("output", ["| head -n 1", "> /dev/full", ">&- 2>&-"])
def test_a_run_goes_on_without_a_reader(output: str, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", make_shards(tmp_path), tmp_path / "run", training__steps=3)
    done = run_shell(f"set -o pipefail; {COMMAND} train {config} {output}")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
