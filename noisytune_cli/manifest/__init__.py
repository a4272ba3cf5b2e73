"""The record of a run: written, read believing nothing, found again."""
