"""Count decisions, FLOPs and bytes; capture graphs."""
