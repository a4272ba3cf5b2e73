"""What is read: from what the user typed to open weight files."""
