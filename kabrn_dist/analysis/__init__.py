"""Reports of a finished run: experts, learned functions, ternary weights."""
