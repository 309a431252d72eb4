"""The command `mixkabrn`: one module per subcommand, each with `add_parser` and `run`.

The modules import argparse and nothing heavy; what a command works with is imported when it runs.
"""
