"""Compute on rows: the PyTorch reference of each operation."""
