"""Generation refuses values without a meaning in one line, and a reader that goes away ends it quietly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kabrn_dist.cli.main import main
from kabrn_dist.inference.generate import draw_token
from kabrn_dist.inference.sampling import check_sampling
from kabrn_dist.utils.errors import UserError

ROOT = Path(__file__).parents[2]
LIKELY = torch.tensor([1.0, 5.0, 3.0])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--temperature", "nan", "temperature nan: use 0 for the likeliest token, or 0.0001 to 10000"),
        ("--temperature", "-1", "temperature -1"),
        ("--temperature", "1e-320", "temperature 9.99989e-321"),
        ("--temperature", "inf", "temperature inf"),
        ("--temperature", "1e308", "temperature 1e+308"),
        ("--top-k", "-3", "top_k -3"),
        ("--tokens", "-5", "--tokens: -5 is less than 1"),
        ("--seed", str(2**70), f"seed {2**70}: use 0 to"),
        ("--seed", "-1", "seed -1"),
        ("--prompt", "caf\udce9", "prompt 'caf\ufffd': not UTF-8"),
    ],
)
def test_a_value_without_a_meaning_is_named(
    option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # The value comes first: no folder is looked at.
    assert main(["generate", "runs/none", f"{option}={value}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_the_limits_of_what_is_allowed_work() -> None:
    check_sampling("é", 0, 0, 0, 2**63 - 1)
    generator = torch.Generator().manual_seed(2**63 - 1)
    for temperature in (0, 1e-4):
        assert draw_token(LIKELY, temperature, 0, generator) == 1
    drawn = {draw_token(LIKELY, 1e4, 2**70, generator) for _ in range(60)}
    assert drawn == {0, 1, 2}
    with pytest.raises(UserError, match="top_k"):
        check_sampling("", 1, 1, -1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["train", "--help"], ["config"]])
def test_every_command_ends_quietly_when_its_reader_goes_away(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "kabrn_dist", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    # argparse itself passes over a closed pipe.
    assert process.returncode in (0, 141)


@pytest.mark.slow
def test_a_terminal_without_unicode_or_without_stdout_ends_nothing() -> None:
    code = "import sys; from kabrn_dist.cli.main import main; main(['config', 'model.router']); print('é\u2011漢')"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False
    )
    assert shown.returncode == 0 and shown.stdout.endswith(b"???\n"), shown.stderr
    closed = f"{sys.executable} -m kabrn_dist config >&-"
    assert subprocess.run(closed, shell=True, cwd=ROOT, check=False, capture_output=True).stderr == b""
