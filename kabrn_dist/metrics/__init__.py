"""What is measured of a training step, and where it is logged."""
