"""One file a question; each prints a table and writes JSON. `python -m benchmarks.NAME [--quick] [--json FILE]`."""
