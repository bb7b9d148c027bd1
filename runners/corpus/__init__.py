"""Read text and cut it into rows of tokens."""
