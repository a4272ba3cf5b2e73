"""Which tensors get noise, which do not, and why: from headers, and a look at a few values."""
