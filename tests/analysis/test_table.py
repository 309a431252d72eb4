"""Tables of reports: whole on a wide console, in blocks of whole columns on a narrow one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kabrn_dist.analysis.table import print_table

NAMES = ("layer", "matrix", *(f"column {number}" for number in range(9)))
ROWS = [(str(layer), "mixture.routed.down", *["34.4 (33.8–34.9)"] * 9) for layer in range(2)]


def printed(width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_table(console, "weights", NAMES, ROWS, keys=2)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 240])
def test_nothing_is_cut_at_any_width(width: int) -> None:
    lines = printed(width)
    assert lines[0].startswith("weights") and "…" not in "".join(lines)
    assert all(len(line) <= width for line in lines)
    blocks = sum("layer" in line for line in lines)
    assert sum("mixture.routed.down" in line for line in lines) == 2 * blocks, "every block says what its rows are"
    for name in NAMES[2:]:
        assert sum(name in line for line in lines) == 1
    assert "".join(lines).count("34.4 (33.8–34.9)") == 18
    assert (blocks == 1) == (width == 240)


def test_a_cell_wider_than_the_console_is_folded() -> None:
    console = Console(file=io.StringIO(), width=30)
    print_table(console, "", ("key", "formula"), [("1", "x" * 60)], keys=1)
    assert isinstance(console.file, io.StringIO) and console.file.getvalue().count("x") == 60
