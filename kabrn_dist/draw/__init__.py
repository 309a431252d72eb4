"""Pictures of numbers: plain tensors → matplotlib figures. Needs no display and keeps no state."""
