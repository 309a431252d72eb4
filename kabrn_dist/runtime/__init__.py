"""A trained model in one file, and the C program that runs it anywhere."""
