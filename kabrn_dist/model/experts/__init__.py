"""Expert networks by type."""
