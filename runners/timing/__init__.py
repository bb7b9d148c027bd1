"""Time the routed model against the dense one."""
