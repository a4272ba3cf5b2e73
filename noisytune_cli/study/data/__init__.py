"""The rows that a study trains and scores on."""
