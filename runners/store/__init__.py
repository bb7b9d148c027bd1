"""Keep what a point did: its folder, log, items and cached stages."""
