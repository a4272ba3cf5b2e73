"""What `noisytune study` is made of: tasks, methods, runs, and what the runs say together."""
