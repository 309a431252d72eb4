"""Adapters: what fine-tuning changed, kept apart from the model it was trained on. Needs numpy, no torch."""
