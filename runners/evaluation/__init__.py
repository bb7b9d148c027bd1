"""Measure perplexity and task accuracy."""
