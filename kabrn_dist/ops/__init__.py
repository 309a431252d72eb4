"""Pure functions on tensors, each beside its naive twin."""
