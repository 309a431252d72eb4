"""Checkpoints that do not depend on how many ranks wrote them."""
