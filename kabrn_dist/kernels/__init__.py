"""Kernels in C for what torch would do in many passes over memory, and the one choice whether they are used."""
