"""Training: losses, the DeepSpeed engine, metrics and the loop."""
