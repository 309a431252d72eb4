"""Figures drawn from plain tensors."""
