"""Shards on disk, the order they are read in, and the batches a model sees."""
