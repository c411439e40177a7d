"""BEE: see `explain`."""
