"""Does it help? Finetuning runs, their methods and their report."""
