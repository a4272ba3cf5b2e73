"""What a user types and sees: options in, results out."""
