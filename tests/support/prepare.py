"""Preparations in this process, as the command line starts them."""

from __future__ import annotations

import pytest

from data_prep.__main__ import main


def prepare(*arguments: object) -> int:
    """Return the exit code of `python -m data_prep ARGUMENTS`."""
    return main([str(argument) for argument in arguments])


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line with which a preparation is refused."""
    capsys.readouterr()
    assert prepare(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error
