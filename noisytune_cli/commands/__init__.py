"""The verbs, one file each. A command takes plain values and returns records; it never prints."""
