"""Write the tables and figures of the documents from the benchmarks' results, so that nobody types a figure.

Results are committed in benchmarks/results. In a document,

    <!-- table: NAME -->
    <!-- end -->

takes a table of `benchmarks/table_contents.py` between its two lines, and `<!-- value: NAME --><!-- end -->` a figure.
`python -m benchmarks.tables` writes them all; with `--check` it writes nothing and fails where a document differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.results import Results
from benchmarks.table_contents import TABLES, VALUES

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/*.md")
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_VALUE = re.compile(r"(<!-- value: ([\w-]+) -->)[^\n]*?(<!-- end -->)")

Contents = Mapping[str, Callable[[Results], str]]


def fill_document(text: str, results: Results, tables: Contents = TABLES, values: Contents = VALUES) -> str:
    """Return `text` with everything between its markers replaced.

    Raises:
        KeyError: if a marker names a table or figure that is not defined.
    """
    text = _TABLE.sub(lambda found: f"{found[1]}{tables[found[2]](results)}\n{found[3]}", text)
    return _VALUE.sub(lambda found: f"{found[1]}{values[found[2]](results)}{found[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 1 if `--check` finds a document that differs.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document differs")
    options = parser.parse_args(arguments)
    results = Results(ROOT / "benchmarks" / "results")
    stale = []
    for path in sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        filled = fill_document(text, results)
        if filled != text:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(filled, encoding="utf-8")
    if stale:
        print(f"{'differs' if options.check else 'written'}: {', '.join(stale)}", file=sys.stderr)
    if stale and options.check:
        print("run: python -m benchmarks.tables", file=sys.stderr)
    return int(bool(stale) and options.check)


if __name__ == "__main__":
    sys.exit(main())
