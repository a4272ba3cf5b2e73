"""Fuzzing of everything that reads a stranger's bytes: valid documents, mutated, and what must hold."""
