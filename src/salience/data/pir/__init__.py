"""Perplexity-based importance refinement: drop the functional steps of a reasoning trace that its answer does not need."""
