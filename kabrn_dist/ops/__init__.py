"""Pure functions on tensors, each next to its naive twin."""
