"""Hugging Face: models out to its libraries, models and tokenizers in from them."""
