"""Scores of trained models on published tasks, read from local files."""
