"""Moving tokens between ranks."""
