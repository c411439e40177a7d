"""The generation room: what steers a generator."""
