"""Compute on rows by C loops compiled for this processor."""
