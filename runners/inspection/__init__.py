"""Tabulate which tokens a routed model executes."""
