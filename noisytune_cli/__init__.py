"""noisytune: reproducible, std-scaled noise for pretrained checkpoints (NoisyTune, Wu et al., ACL 2022)."""

__version__ = "0.1.0"

__all__ = ["__version__"]
