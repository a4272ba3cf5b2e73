"""One finetuning run: the model, its training and what is measured of it."""
