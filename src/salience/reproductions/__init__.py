"""One reproduction script per paper, and the worlds that they share."""
