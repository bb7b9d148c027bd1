"""Execute a routed layer: masked, gathered, fused, one token."""
