"""Online learning: adapters trained on the user's own machine, in seconds, from corrections and notes."""
