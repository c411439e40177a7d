"""The concepts room: which concepts a network uses."""
