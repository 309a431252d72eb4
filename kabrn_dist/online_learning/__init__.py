"""Online learning: adapters trained on the user's own machine, in seconds, from corrections in a chat and from notes."""
