"""Which tensors get noise, which do not, and why. From headers alone."""
