"""Estimate what a sweep will cost."""
