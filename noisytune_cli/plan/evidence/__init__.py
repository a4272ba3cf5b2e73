"""What a tensor is, parameter or buffer: who says so, the strongest first (`told.py`), a file for each."""
