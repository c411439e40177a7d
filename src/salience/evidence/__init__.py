"""Evidence: runs, outcomes, bars, and the verdicts computed from them."""
