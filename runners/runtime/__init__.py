"""Share a machine: processes, signals, memory, progress."""
