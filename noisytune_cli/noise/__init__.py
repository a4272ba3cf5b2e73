"""The numbers: the stream, the std, distributions and devices. No file, no name of a checkpoint."""
