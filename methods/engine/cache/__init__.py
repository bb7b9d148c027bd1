"""Keep keys and values, whole or without bypassed tokens."""
