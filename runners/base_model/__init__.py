"""Load the untouched model of a point."""
