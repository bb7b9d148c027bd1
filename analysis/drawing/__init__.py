"""Draw and tabulate: style, tables, coloured text."""
