"""The tokens room: which tokens matter; attention."""
