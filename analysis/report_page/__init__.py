"""Render the store as one HTML page."""
