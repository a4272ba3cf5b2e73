"""The same noise on a live model."""
