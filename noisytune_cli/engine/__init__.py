"""A plan carried out: every tensor read, measured, noised, written."""
