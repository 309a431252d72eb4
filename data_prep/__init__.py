"""Turn texts into tokenized shards: `python -m data_prep --help`."""

DEFAULT_VOCAB_SIZE = 4096
"""Vocabulary size of a trained tokenizer if none is given."""
