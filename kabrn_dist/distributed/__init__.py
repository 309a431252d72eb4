"""Ranks, process groups and what they exchange."""
