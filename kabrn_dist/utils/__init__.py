"""Errors, atomic files, locks and fault injection."""
