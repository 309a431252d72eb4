"""Turns texts into tokenised shards: `python -m data_prep --help`."""
