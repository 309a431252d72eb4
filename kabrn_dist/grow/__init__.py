"""A trained run grown into a larger configuration: more experts, mixtures for dense layers, finer grids."""
