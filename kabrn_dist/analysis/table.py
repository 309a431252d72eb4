"""Tables of a report: on a narrow terminal the columns that do not fit follow below, with the same first ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

# What rich draws around the text of a column, and at the end of a row.
BORDER_WIDTH, LAST_WIDTH = 3, 1


def print_table(
    console: Console,
    title: str,
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    keys: int,
    left: Collection[str] = (),
) -> None:
    """Print a table, in several blocks of columns if it is wider than the console.

    Args:
        console: Where it is printed.
        title: Line above it.
        names: Names of the columns.
        rows: Cells of each row.
        keys: Number of the first columns, which say what a row is about and are repeated in every block.
        left: Names of columns that are aligned to the left.
    """
    for number, columns in enumerate(_split_columns(console.width, names, rows, keys)):
        table = Table(title=title if number == 0 else None, title_justify="left")
        for column in columns:
            # A cell that is wider than the whole console is folded, never cut.
            table.add_column(names[column], justify="left" if names[column] in left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        console.print(table)


def _split_columns(width: int, names: Sequence[str], rows: Sequence[Sequence[str]], keys: int) -> Iterator[list[int]]:
    """Blocks of columns, as many in each as fit."""
    widths = [max(map(cell_len, cells)) + BORDER_WIDTH for cells in zip(names, *rows, strict=True)]
    first = list(range(keys))
    block = list(first)
    for column in range(keys, len(names)):
        is_full = sum(widths[each] for each in [*block, column]) + LAST_WIDTH > width
        if is_full and len(block) > keys:
            yield block
            block = list(first)
        block.append(column)
    yield block
