"""Draw and tabulate: style, tables."""
