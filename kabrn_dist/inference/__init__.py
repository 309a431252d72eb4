"""A trained model in one process: load, generate, export."""
